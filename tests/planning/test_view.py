import csv
import dataclasses
import re

import pytest

from specmemo_jax.devices.compiled import CompiledCheck
from specmemo_jax.devices.table import find_device
from specmemo_jax.draft import NgramDrafter
from specmemo_jax.errors import ConfigError, SpecMemoError
from specmemo_jax.files.byte_size import format_bytes
from specmemo_jax.memory.workload import Workload
from specmemo_jax.planning.frontier import check_frontier_file, read_measured, write_frontier
from specmemo_jax.planning.profile import ExpectedAcceptance
from specmemo_jax.planning.request import Planning
from specmemo_jax.planning.search import Candidate, PlanRequest
from specmemo_jax.planning.speed import roofline
from specmemo_jax.planning.view import WIDTH, as_json, as_text, theory_of
from specmemo_jax.testing import TINY


def planning(batch: int = 1) -> Planning:
    device = find_device("titan-rtx")
    task = PlanRequest(TINY, "float16", device, Workload(batch, 64, 32))
    options = (
        Candidate(),
        Candidate(NgramDrafter(8), ExpectedAcceptance(2.0, ((8, 1.0),), "assumed for a test " * 9)),
    )
    return Planning(task, options, roofline(device))


@pytest.fixture(scope="module")
def plan():
    return planning().plan()


def proved(plan, extra: int):
    programs = tuple((name, extra) for name in ("step 1, greedy", "step 8, greedy", "prefill 256, greedy"))
    kept = sum(b.bytes for b in plan.buffers) - plan.weights_bytes
    return dataclasses.replace(plan, proof=CompiledCheck("a compiler", "bfloat16", programs, kept + extra))


def test_no_line_of_the_text_is_too_wide_and_none_has_codes(plan):
    lines = as_text(proved(plan, 10**9), "a-model-with-a-long-name" * 5).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert not any("\x1b" in line for line in lines)
    assert "\x1b[" in as_text(plan, "tiny", color=True)


def test_terms_of_the_text_are_those_of_the_plan_and_sizes_end_in_one_column(plan):
    text = as_text(plan, "tiny")
    for term in plan.terms:
        assert re.search(rf"{re.escape(term.name)} .*{re.escape(format_bytes(term.bytes))} ", text), term
    rows = [line for line in text.splitlines() if line.endswith("%")]
    ends = {re.search(r" (B|KiB|MiB|GiB)  ", row).end() for row in rows}  # pyright: ignore[reportOptionalMemberAccess]
    assert len(ends) == 1
    assert f"{plan.footprint.largest.name} (the largest program)" in text
    assert rows[-1].split()[-1] == "100.0%"


def test_text_says_where_numbers_come_from(plan):
    assert plan.drafter is not None
    text = as_text(plan, "tiny")
    for part in (
        "titan-rtx",
        "float16",
        "64 prompt tokens, 32 new",
        "roofline",
        "assumed for a test",
        "2.00 tokens",
    ):
        assert part in text


def test_plain_decoding_is_not_compared_with_itself():
    searched = planning()
    plain = dataclasses.replace(searched, offered=searched.offered[:1]).plan()
    text = as_text(plain, "tiny")
    assert "none (plain decoding)" in text
    assert "without a drafter" not in text
    assert "least with a drafter" not in text
    assert as_json(plain, "tiny")["least_speculative_budget_bytes"] is None


def test_json_sums_up(plan):
    found = as_json(plan, "tiny")
    assert sum(t["bytes"] for t in found["terms"]) + found["device"]["reserve_bytes"] == found["peak_bytes"]
    assert found["lower_bound_bytes"] >= found["least_budget_bytes"]
    assert "compiled_peak_bytes" not in found


def test_the_compilers_word_beside_the_theory(plan):
    excess = plan.footprint.largest.bytes + 3 * 2**20
    found = as_json(proved(plan, excess), "tiny")
    assert found["generation_bytes"] == found["compiled_generation_bytes"]
    assert found["generation_bytes"] == found["model_generation_bytes"] + 3 * 2**20
    assert found["compiled_peak_bytes"] == found["peak_bytes"]
    by_name = {p["name"]: p["model_bytes"] for p in found["programs"]}
    theory = {p.name: p.bytes for p in plan.footprint.programs}
    assert by_name["step 8, greedy"] == theory["step 8"]
    assert by_name["step 1, greedy"] == theory["step 1"]
    assert (
        theory_of(plan, f"prefill {plan.shapes.chunks[0]}, sampled")
        == theory[f"prefill {plan.shapes.chunks[0]}"]
    )
    text = as_text(proved(plan, excess), "tiny")
    assert "compiled for a compiler, bfloat16" in text
    assert "bfloat16 stands in for float16" in text
    assert "beyond the theory (compiler)" in text
    assert "-3.00 MiB" in text


def test_frontier_as_csv(plan, tmp_path):
    file, measured = tmp_path / "f.csv", tmp_path / "m.csv"
    measured.write_text("peak_bytes,tokens_per_second\n1000000000,12.5\n")
    check_frontier_file(file)
    write_frontier(file, planning().frontier(), plan, "tiny", read_measured(measured))
    rows = list(csv.DictReader(file.read_text().splitlines()))
    peaks = [int(row["peak_bytes"]) for row in rows if row["kind"] == "expected"]
    rates = [float(row["tokens_per_second"]) for row in rows if row["kind"] == "expected"]
    assert peaks == sorted(peaks)
    assert rates == sorted(rates)
    (chosen,) = (row for row in rows if row["kind"] == "chosen")
    assert (int(chosen["peak_bytes"]), int(chosen["context"])) == (plan.peak_bytes, plan.context)
    (least,) = (row for row in rows if row["kind"] == "least_budget")
    assert int(least["peak_bytes"]) == peaks[0]
    assert rows[-1]["kind"] == "measured"
    assert rows[-1]["tokens_per_second"] == "12.5"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_frontier_as_a_picture(plan, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"f.{suffix}"
    write_frontier(file, planning().frontier(), plan, "tiny", [(10**9, 12.5, "measured")])
    start = file.read_bytes()[:400]
    assert start.startswith(b"\x89PNG") or b"<svg" in file.read_bytes()[:1000]


def test_frontier_files_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"\.csv would work"):
        check_frontier_file(tmp_path / "f.pdf")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(SpecMemoError, match=r"pip install 'specmemo-jax\[plot\]'"):
        check_frontier_file(tmp_path / "f.png")
    check_frontier_file(tmp_path / "f.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("a,b\n1,2\n", "no column peak_bytes, tokens_per_second"),
        ("peak_bytes,tokens_per_second\n1,2\nx,2\n", "line 3"),
        ("peak_bytes,tokens_per_second\n1\n", "line 2"),
        ("peak_bytes,tokens_per_second\n1,inf\n", "line 2"),
    ],
)
def test_measured_points_that_are_not_understood(tmp_path, text, message):
    file = tmp_path / "m.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_measured(file)


@pytest.mark.parametrize(
    ("found", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (-(2**21), "-2.00 MiB")]
)
def test_sizes(found, shown):
    assert format_bytes(found) == shown
