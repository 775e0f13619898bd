"""Batches end to end on a tiny model: order, errors, kills and what a later run makes of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.batch import run as batch_run
from specmemo_jax.errors import RequestError
from specmemo_jax.files.rows import OutputError

GREEDY = SamplingParams(temperature=0, max_tokens=6)
LINES = [
    *(
        {
            "custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "ab " * (n % 4 + 1)}],
                     "max_tokens": 2 + n * 5 % 11,
                     "temperature": n % 2},
        }
        for n in range(8)
    ),
    {"prompt": "hello", "max_tokens": 3},
    {"custom_id": "bad", "prompt": "x", "top_p": 7},
    {"custom_id": "long", "prompt": "x" * 300},
    {"custom_id": "last", "prompt": [5, 6, 7]},
]  # fmt: skip


@pytest.fixture
def requests(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + "{torn\n")
    return path


@pytest.fixture(scope="module")
def llm(tiny_model):
    with LLM(tiny_model, max_context=96, max_batch=3, drafter="ngram", tree_nodes=4) as llm:
        yield llm


def rows(path: Path) -> list[dict]:
    """A batch's rows without the times."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in found:
        row["response"]["body"].pop("created", None)
    return found


def text(row: dict) -> str:
    choice = row["response"]["body"]["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def run(llm, requests, results, **options):
    return llm.run_batch(requests, results, sampling_params=GREEDY, **options)


@pytest.fixture(scope="module")
def whole(llm, tmp_path_factory) -> list[dict]:
    """The rows of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + "{torn\n")
    summary = run(llm, folder / "in.jsonl", folder / "out.jsonl")
    assert (summary.answered, summary.errors, summary.found_done) == (10, 3, 0)
    return rows(folder / "out.jsonl")


def test_rows_are_openais_in_the_lines_order(llm, whole):
    assert [row["custom_id"] for row in whole] == [
        *(f"r{n}" for n in range(8)),
        None,
        "bad",
        "long",
        "last",
        None,
    ]
    for row, line in zip(whole, LINES, strict=False):
        if row["error"] is not None:
            continue
        body = row["response"]["body"]
        assert body["object"] == ("chat.completion" if "body" in line else "text_completion")
        assert body["usage"]["completion_tokens"] <= line.get("body", line).get("max_tokens", 6)
        assert body["choices"][0]["finish_reason"] in ("stop", "length")
    for row, number in zip(whole[9:11], (10, 11), strict=True):
        assert row["response"]["status_code"] == 400
        assert row["error"]["line"] == number
        assert row["error"]["message"].startswith(f"line {number}: ")
    assert whole[-1]["custom_id"] is None
    assert "not JSON" in whole[-1]["error"]["message"]


def test_an_answer_is_the_one_of_its_prompt_alone(llm, whole, tiny_model):
    with LLM(tiny_model, max_context=96, drafter=None) as alone:
        for n in (0, 2, 4, 6):
            body = LINES[n]["body"]
            params = SamplingParams(temperature=0, max_tokens=body["max_tokens"])
            assert alone.chat(body["messages"], params)[0].outputs[0].text == text(whole[n])
        assert alone.generate("hello", SamplingParams(temperature=0, max_tokens=3))[0].outputs[
            0
        ].text == text(whole[8])


def test_unordered_rows_are_the_same(llm, whole, requests, tmp_path):
    run(llm, requests, tmp_path / "out.jsonl", unordered=True)
    by_id = {row["id"]: row for row in rows(tmp_path / "out.jsonl")}
    assert by_id == {row["id"]: row for row in whole}


@pytest.mark.parametrize("share", [0, 0.01, 0.2, 0.45, 0.77, 0.999, 1])
def test_a_file_cut_anywhere_is_completed(llm, whole, requests, tmp_path, share):
    out = tmp_path / "out.jsonl"
    run(llm, requests, out)
    content = out.read_bytes()
    out.write_bytes(content[: int(share * len(content))])
    left = out.read_bytes().count(b"\n")
    summary = run(llm, requests, out, resume=True)
    assert rows(out) == whole
    assert (summary.found_done, summary.rows) == (left, len(whole) - left)


def test_lines_may_be_added_and_errors_asked_again(llm, whole, requests, tmp_path):
    out = tmp_path / "out.jsonl"
    run(llm, requests, out)
    lines = requests.read_text().replace('"top_p": 7', '"top_p": 0.7').splitlines()
    requests.write_text("\n".join(['{"custom_id": "new", "prompt": "y"}', *lines]))
    summary = run(llm, requests, out, retry_errors=True)
    assert (summary.found_done, summary.answered, summary.errors) == (8 + 1, 3, 2)
    by_id = {row["custom_id"]: row for row in rows(out)}
    assert by_id["bad"]["error"] is None
    assert text(by_id["r1"]) == text(whole[1])
    assert not list(tmp_path.glob("*.retry"))


def test_what_another_run_wrote_is_not_touched(llm, requests, tmp_path):
    out = tmp_path / "out.jsonl"
    run(llm, requests, out)
    content = out.read_bytes()
    with pytest.raises(OutputError, match="holds rows already; --resume goes on"):
        run(llm, requests, out)
    with pytest.raises(RequestError, match="other settings"):
        run(llm, requests, out, resume=True, seed=1)
    with pytest.raises(RequestError, match="own file"):
        run(llm, requests, requests)
    assert out.read_bytes() == content
    for other in ("text\n", "[1]\n", '{"id": "x"}\n'):
        out.write_text(other)
        with pytest.raises(RequestError, match="line 1: not a row of a batch"):
            run(llm, requests, out, resume=True)
        assert out.read_text() == other


def test_two_runs_do_not_write_one_file(llm, requests, tmp_path):
    def again(_):
        with pytest.raises(OutputError, match="another run is writing"):
            run(llm, requests, tmp_path / "out.jsonl", resume=True)

    run(llm, requests, tmp_path / "out.jsonl", progress=again)


def test_lines_are_read_as_they_are_needed(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_run, "AHEAD", 2)
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 3}\n' * 60)
    read = []
    job_of = batch_run.job_of
    monkeypatch.setattr(
        batch_run, "job_of", lambda llm, line, seed: (read.append(line), job_of(llm, line, seed))[1]
    )
    most = 0

    def show(summary):
        nonlocal most
        most = max(most, len(read) - summary.rows)

    assert run(llm, path, out, progress=show).answered == 60
    assert most <= (2 + 1) * llm.plan.batch


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(llm, requests):
    with pytest.raises(OutputError, match=r"No space left on device.*free space and --resume work"):
        run(llm, requests, "/dev/full")


def command(tiny_model, requests, out, *more: str) -> list[str]:
    options = ("--model", str(tiny_model), "--max-context", "96", "--max-batch", "2", "--max-tokens", "6")
    return [sys.executable, "-m", "specmemo_jax", "batch", str(requests), str(out), *options, *more]


def test_a_run_that_is_killed_goes_on(tiny_model, whole, requests, tmp_path):
    """Once with kill -9, once with Ctrl-C; scripts/check_batch_kills.py does it 100 times."""
    out = tmp_path / "out.jsonl"
    # A killed process may leave half a program behind: not in the cache that all tests share.
    environment = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    for kill, wanted in ((signal.SIGKILL, 2), (signal.SIGINT, 5)):
        process = subprocess.Popen(
            command(tiny_model, requests, out, "--resume"), env=environment, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < wanted):
            time.sleep(0.002)
        process.send_signal(kill)
        _, said = process.communicate(timeout=60)
        if kill == signal.SIGINT and process.returncode == 130:
            assert "--resume goes on" in said
    done = subprocess.run(
        command(tiny_model, requests, out, "--resume"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert rows(out) == whole
    assert "were there" in done.stderr
    refused = subprocess.run(
        command(tiny_model, requests, out), env=environment, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 1
    assert "holds rows already" in refused.stderr
