"""scripts/check_device.py: the report holds every part, whatever becomes of one, and judges right."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from specmemo_jax.errors import CapacityError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.serve.outputs import CompletionOutput, RequestMetrics, RequestOutput
from specmemo_jax.testing import tiny_llama

SCRIPTS = Path(__file__).parent.parent / "scripts"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture
def check(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path / "cache"))
    import check_device  # pyright: ignore[reportMissingImports]

    return check_device


@pytest.fixture
def jobs(check):
    import check_device_jobs  # pyright: ignore[reportMissingImports]

    return check_device_jobs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder without a tokenizer: the prompts are random then."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = tiny_llama(LlamaConfig.from_dict(CONFIG))
    named = {name if name.startswith("lm_head") else f"model.{name}": x for name, x in tensors.items()}
    save_file(named, folder / "model.safetensors")
    return str(folder)


def test_a_table_stays_one_whatever_is_in_its_cells(check):
    assert check.table(("a", "b"), [["x | y", "two\nlines"]]) == (
        "| a | b |\n| --- | --- |\n| x \\| y | two lines |"
    )


def test_a_chapter_joins_its_processes(check):
    section = check.Section("name", "Title", ("a",), (), ())
    text, failures = check.chapter(
        section,
        [check.Result([["1"]], ["same note"]), check.Result([["2"]], ["same note"], ["it broke"])],
    )
    assert text == "## Title\n\n| a |\n| --- |\n| 1 |\n| 2 |\n\nsame note\n\n**Failed**: it broke"
    assert failures == ["it broke"]
    assert check.chapter(section, [check.Result([])]) == ("## Title", [])


@pytest.mark.parametrize(("failures", "code"), [([], 0), (["it broke"], 1)])
def test_the_report_goes_on_after_a_failure_and_tells(check, monkeypatch, tmp_path, capsys, failures, code):
    def run(name, arguments, options):
        return check.Result([["x"] * 8], [], failures if name == "equality" else [])

    monkeypatch.setattr(check, "run", run)
    file = tmp_path / "report.md"
    assert check.main(["--quick", "--output", str(file)]) == code
    report = capsys.readouterr().out
    assert file.read_text() == report
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        *(f"## {section.title}" for section in check.SECTIONS),
        "## Result",
    ]
    assert report.endswith("- it broke\n\n" if code else "All checks passed.\n\n")


def test_only_some_parts(check, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(check, "run", lambda name, *_: ran.append(name) or check.Result([]))
    assert check.main(["--only", "steps", "device"]) == 0
    assert ran == ["device", "steps", "steps"]


def test_a_process_that_fails_is_in_the_report(check, tmp_path, capfd):
    options = argparse.Namespace(model=str(tmp_path / "nothing-here"), quick=True)
    result = check.run("steps", {"dtype": "auto"}, options)
    assert result.rows == []
    assert "nothing-here" in result.notes[0]
    assert result.failures == ["steps, dtype auto: ended with exit code 1"]
    assert capfd.readouterr().err.startswith("steps, dtype auto ... ")


def test_a_process_that_hangs_is_in_the_report(check, monkeypatch, model):
    monkeypatch.setattr(check, "MOST_SECONDS", 0.1)
    result = check.run("device", {}, argparse.Namespace(model=model, quick=True))
    assert result.failures == ["device: no result after 0.1 s"]


def test_two_parts_as_they_are_run(check, model, tmp_path, capsys):
    file = tmp_path / "report.md"
    assert check.main(["--quick", "--model", model, "--only", "device", "memory", "--output", str(file)]) == 0
    report = file.read_text()
    assert "jaxlib" in report
    assert "JAX sees no accelerator here" in report
    row = next(line for line in report.splitlines() if line.startswith("| float32 | ngram | 4 |"))
    plan, step, prefill, measured = (cell.strip() for cell in row.split("|")[4:8])
    assert 0 < float(step) <= float(plan)
    assert 0 < float(prefill) <= float(plan)
    assert measured.startswith("(")  # a CPU's allocator keeps no figures: it is the process's
    assert "not the device's figure" in report


@pytest.mark.parametrize(("measured", "failures"), [(1000, 0), (10**12, 1)])
def test_a_device_that_tells_its_peak(jobs, model, monkeypatch, measured, failures):
    def no_figures(program):
        raise CapacityError("none here")

    monkeypatch.setattr(jobs, "_peak", lambda device: measured)
    monkeypatch.setattr(jobs, "compiled_memory", no_figures)
    result = jobs.memory(model, True, "none", "auto", 1)
    ((dtype, drafter, batch, plan, step, prefill, peak, share),) = result.rows
    assert (dtype, drafter, batch, step, prefill) == ("float32", "none", "1", "no figure", "no figure")
    assert peak == f"{measured / 2**20:,.1f}"
    assert share.endswith("%")
    assert float(plan) > 0
    assert len(result.failures) == failures
    assert all("the measured peak exceeds the plan" in failure for failure in result.failures)


def test_equality_counts_answers(jobs, model, monkeypatch):
    monkeypatch.setattr(jobs, "_equality_cases", lambda target, quick: [(jobs._drafter("ngram", target), 1)])
    result = jobs.equality(model, True, "float32")
    assert [row[:5] for row in result.rows] == [
        ["float32", "ngram", "1", way, "2 of 2"] for way in ("greedy", "sampled")
    ]
    assert result.failures == []


@pytest.mark.parametrize(
    ("dtype", "gap", "fails"), [("float32", 0, True), ("half", 9, True), ("half", 0.1, False)]
)
def test_answers_that_differ(jobs, model, monkeypatch, dtype, gap, fails):
    def answer_all(target, drafter, batch, prompts, params):
        ids = [(1, 2, 3), (1, 2, 3 if drafter is None else 4)]
        return {way: [answer(one) for one in ids] for way in params}

    monkeypatch.setattr(jobs, "_answer_all", answer_all)
    monkeypatch.setattr(jobs, "logit_gap", lambda *_: gap)
    result = jobs.equality(model, True, dtype)
    assert {row[4] for row in result.rows} == {"1 of 2"}
    assert bool(result.failures) == fails
    assert any(f"{gap:.3f}" in note for note in result.notes) == (dtype == "half")


def answer(ids) -> RequestOutput:
    metrics = RequestMetrics(2, (1, 1), 0.1, 0.1)
    return RequestOutput("0", None, (5,), (CompletionOutput(0, "", ids, "length"),), metrics)


def test_the_logits_between_two_tokens(jobs, model):
    """Against all gaps at once: the target's own choice is above every other token."""
    _, target = jobs._load(model, "float32")
    prompt, answer = [3, 1, 4], [1, 5, 9, 2]
    gaps = {
        (a, b): jobs.logit_gap(target, prompt, [*answer, a], [*answer, b])
        for a, b in ((10, 20), (20, 30), (10, 30))
    }
    assert all(gap > 0 for gap in gaps.values())
    one, two, both = gaps.values()
    assert np.isclose(both, one + two, atol=1e-5) or np.isclose(both, abs(one - two), atol=1e-5)


def test_times_are_of_every_size(jobs, model):
    (row,) = jobs.steps(model, True, "auto").rows
    assert row[:3] == ["float32", "1", "256"]
    assert row[3].endswith("(1.00)")
    assert len(row) == 7
    rows = jobs.speed(model, True, "auto").rows
    assert len(rows) == 3
    assert all(float(cell) > 0 for row in rows[:2] for cell in row[3:])
    assert rows[2][1] == "224 tokens"
