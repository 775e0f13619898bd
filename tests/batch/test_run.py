"""Whatever a line holds, it becomes its own row, at every batch; a killed run asks for nothing twice."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strange_lines import BATCH_LINES, EVERYTHING, SURROGATE, encoded

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.batch import request_tokens
from specmemo_jax.batch import run as batch_run
from specmemo_jax.batch.lines import parse_line, read_lines
from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.errors import RequestError
from specmemo_jax.files.rows import OutputError

GREEDY = SamplingParams(temperature=0, max_tokens=4)
FAST = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def strict_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with a template that refuses a role."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "strict"))
    template = (folder / "chat_template.jinja").read_text()
    refusal = "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template.replace("%}", "%}" + refusal, 1))
    return folder


def write(path: Path, lines) -> Path:
    path.write_bytes(b"".join(encoded(line) + b"\n" for line in lines))
    return path


def rows(path: Path) -> list[dict]:
    """Rows without the times, and without what a run's settings give them."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in found:
        for name in ("created", "id", "system_fingerprint"):
            row["response"]["body"].pop(name, None)
        row.pop("id")
        row["response"].pop("request_id")
    return found


@pytest.fixture(scope="module")
def everything(strict_model, tmp_path_factory) -> dict:
    """The rows of one of everything, by batch."""
    folder, found = tmp_path_factory.mktemp("everything"), {}
    source = write(folder / "in.jsonl", EVERYTHING)
    for batch in (1, 4, "auto"):
        lengths = ()
        if batch != 1:
            lengths = request_tokens(source, Tokenizer.from_folder(strict_model), GREEDY)
        with LLM(
            strict_model,
            max_context=96,
            max_batch=batch,
            request_tokens=lengths,
            dtype="float32",
            memory_budget="64MiB",
        ) as llm:
            llm.run_batch(source, folder / f"{batch}.jsonl", sampling_params=GREEDY)
        found[batch] = rows(folder / f"{batch}.jsonl")
    return found


def test_run_one_of_everything_has_a_row_a_line_alike_at_every_batch(everything):
    assert len(EVERYTHING) == len(everything[1]) == 40
    assert everything[1] == everything[4] == everything["auto"]


def by_id(everything) -> dict:
    return {row["custom_id"]: row for row in reversed(everything[1])}


@pytest.mark.parametrize(
    ("custom_id", "said"),
    [
        ("a template that refuses", "the chat template refuses these messages (no tools)"),
        ("temperature of 400 digits", "temperature must be at least 0, found 999"),
        ("bad words, no text", "bad_words must hold valid Unicode"),
        ("role, no text", "role: not valid Unicode at character 0"),
        ("content, no text", "not valid Unicode at character 0"),
        ("model is a list", "model ['x'] is not served here"),
        ("max_tokens is false", "max_tokens must be None or an integer of at least 1, found False"),
        ("an unknown key", f"a batch line has no {SURROGATE}"),
        ("params are false", '"params" must be an object'),
    ],
)
def test_run_a_line_that_cannot_be_answered_has_its_own_error(everything, custom_id, said):
    assert said in by_id(everything)[custom_id]["error"]["message"]


@pytest.mark.parametrize(
    "custom_id",
    [
        "plain",
        "sampled",
        "neutral",
        "stops at none",
        "no stop",
        "a very hot one",
        SURROGATE,
        "developer",
        "last",
    ],
)
def test_run_a_line_that_can_be_answered_is(everything, custom_id):
    row = by_id(everything)[custom_id]
    assert row["error"] is None
    assert row["response"]["body"]["usage"]["completion_tokens"] >= 1


def test_run_special_tokens_are_shown_where_they_are_asked_for(strict_model, tmp_path):
    lines = [
        {
            "prompt": "ab",
            "ignore_eos": True,
            "max_tokens": 40,
            "skip_special_tokens": shown,
            "bad_words": ["a"],
        }
        for shown in (True, False)
    ]
    with LLM(strict_model, max_context=96) as llm:
        job = [batch_run.job_of(llm, parse_line(encoded(line), 1, None, GREEDY), 0) for line in lines]
    assert [j.params.skip_special_tokens for j in job] == [True, False]
    assert all(j.params.ignore_eos for j in job)


@pytest.mark.parametrize(
    ("given_", "asked"),
    [
        ({"stop": []}, ()),
        ({"stop": None}, ("x",)),
        ({"stop": "none"}, ("none",)),
        ({}, ("x",)),
        ({"stop": "y"}, ("y",)),
    ],
)
def test_line_only_null_and_absence_leave_a_default(given_, asked):
    defaults = SamplingParams(stop="x")
    line = parse_line(encoded({"prompt": "a", **given_}), 1, None, defaults)
    assert line.error is None
    assert line.params is not None
    assert line.params.stop == asked


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": False},
        {"ignore_eos": "none"},
        {"skip_special_tokens": []},
        {"top_p": {}},
        {"foo": []},
        {"n": True},
        {"best_of": True},
        {"use_beam_search": 0},
        {"self": 1},
    ],
)
def test_line_a_value_of_the_wrong_type_is_an_error_that_names_it(wrong):
    line = parse_line(encoded({"prompt": "a", **wrong}), 1, None, GREEDY)
    assert line.error is not None
    assert next(iter(wrong)) in str(line.error)


@FAST
@given(st.lists(BATCH_LINES, min_size=1, max_size=6))
def test_read_lines_of_anything_gives_a_line_each(tmp_path_factory, values):
    source = write(tmp_path_factory.getbasetemp() / "fuzzed.jsonl", values)
    for line in read_lines(source, frozenset(("m",)), GREEDY):
        assert (line.error is None) == (line.params is not None)
    request_tokens(source, None, GREEDY)


@settings(FAST, max_examples=20)
@given(values=st.lists(BATCH_LINES, min_size=4, max_size=8))
def test_run_of_anything_gives_a_row_each_and_a_resumed_run_none(strict_llm, tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("fuzzed")
    source, out = write(folder / "in.jsonl", values), folder / "out.jsonl"
    strict_llm.run_batch(source, out, sampling_params=GREEDY)
    assert len(out.read_bytes().splitlines()) == len(values)
    assert strict_llm.run_batch(source, out, sampling_params=GREEDY, resume=True).rows == 0


@pytest.fixture(scope="module")
def strict_llm(strict_model):
    with LLM(strict_model, max_context=96, max_batch=3, drafter=None) as llm:
        yield llm


def test_run_killed_after_early_rows_asks_for_none_of_them_again(strict_llm, tmp_path, monkeypatch):
    lines = [{"custom_id": str(n), "prompt": "ab", "max_tokens": 60 if n == 0 else 2} for n in range(8)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    whole = tmp_path / "whole.jsonl"
    strict_llm.run_batch(source, whole, sampling_params=GREEDY)

    def stop(summary):
        if summary.rows == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        strict_llm.run_batch(source, out, sampling_params=GREEDY, progress=stop)
    early = tmp_path / "out.jsonl.early"
    assert not out.exists() or not out.read_bytes()  # the first line's answer is the longest
    assert len(early.read_bytes().splitlines()) == 4
    early.write_bytes(early.read_bytes() + b'{"id": "torn')
    asked = []
    job_of = batch_run.job_of
    monkeypatch.setattr(
        batch_run,
        "job_of",
        lambda llm, line, seed: (asked.append(line.custom_id), job_of(llm, line, seed))[1],
    )
    summary = strict_llm.run_batch(source, out, sampling_params=GREEDY, resume=True)
    assert (summary.found_done, summary.rows) == (4, 4)
    assert len(asked) == 4
    assert rows(out) == rows(whole)
    assert not early.exists()


def test_line_a_null_method_is_none_given():
    asked = {"method": None, "url": "/v1/completions", "body": {"prompt": "a"}}
    assert parse_line(encoded(asked), 1, None, GREEDY).error is None


def test_run_a_default_max_tokens_of_400_digits_is_answered(strict_llm, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "ab", "max_tokens": 2}]), tmp_path / "out.jsonl"
    defaults = SamplingParams(temperature=0, max_tokens=int("9" * 400))
    assert strict_llm.run_batch(source, out, sampling_params=defaults).answered == 1


@pytest.mark.parametrize(
    "row",
    [
        "[" * 100_000,
        '{"id": "batch_req_MARK_\u00b2"}',
        '{"id": "batch_req_MARK_' + "9" * 5000 + '"}',
        '{"id": 1e999}',
        "notes",
    ],
)
def test_resume_over_a_file_that_is_no_batch_says_so_and_leaves_it(strict_llm, tmp_path, row):
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "ab"}]), tmp_path / "out.jsonl"
    strict_llm.run_batch(source, out, sampling_params=GREEDY)
    mark = json.loads(out.read_text())["id"].split("_")[2]
    held = row.replace("MARK", mark) + "\n"
    out.write_text(held, encoding="utf-8")
    with pytest.raises(RequestError, match="not a row of a batch"):
        strict_llm.run_batch(source, out, sampling_params=GREEDY, resume=True)
    assert out.read_text(encoding="utf-8") == held


@pytest.mark.parametrize("resume", [False, True])
def test_run_a_file_in_the_place_of_early_rows_is_left_alone(strict_llm, tmp_path, resume):
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "ab"}]), tmp_path / "out.jsonl"
    side = write(tmp_path / "out.jsonl.early", [{"prompt": "a"}])
    for requests, error in ((source, RequestError if resume else OutputError), (side, RequestError)):
        with pytest.raises(error, match=r"out\.jsonl\.early"):
            strict_llm.run_batch(requests, out, sampling_params=GREEDY, resume=resume)
        assert side.read_bytes() == b'{"prompt": "a"}\n'
