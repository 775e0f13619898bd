"""The default model's own weights: every answer is transformers' greedy answer, token for token."""

import json
from pathlib import Path

import pytest
from thorough import THOROUGH

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.draft.ngram import chain

pytestmark = [pytest.mark.weights, pytest.mark.usefixtures("optimized_programs")]

LINES = (Path(__file__).parent / "data" / "mt_bench_reference.jsonl").read_text().splitlines()
HEAD = "smollm2-135m-eagle"
# The short prompts first: two of the ways at batch 1 need one prefill program then, and no growing cache.
ROWS = sorted((json.loads(line) for line in LINES), key=lambda row: len(row["prompt_ids"]))


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"drafter": None}, ROWS if THOROUGH else [*ROWS[:3], ROWS[-1]]),
        ({"drafter": "ngram", "max_batch": 4}, ROWS if THOROUGH else ROWS[11::4]),
        ({"drafter": "ngram", "tree_nodes": 16, "adaptive": False}, ROWS if THOROUGH else ROWS[3:7]),
        ({"drafter": chain(8), "adaptive": False}, ROWS if THOROUGH else ROWS[7:11]),
        ({"drafter": HEAD, "max_batch": 2, "adaptive": False}, ROWS if THOROUGH else ROWS[:4]),
    ],
    ids=["vanilla", "ngram, batch 4", "ngram, 16 nodes", "chain, 8 nodes", "head, batch 2"],
)
def test_answers_are_the_reference_s(options, rows):
    """Questions short and long: each way some of them, and in a thorough run all 40."""
    assert len(ROWS) == 40
    with LLM("smollm2-135m-instruct", dtype="float32", max_context=640, **options) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=64)
        outputs = llm.generate([row["prompt_ids"] for row in rows], greedy)
    for row, output in zip(rows, outputs, strict=True):
        answer, metrics = output.outputs[0], output.metrics
        assert list(answer.token_ids) == row["new_ids"], f"question {row['question_id']}, turn {row['turn']}"
        assert sum(metrics.accepted_lengths) == len(answer.token_ids) - 1
        if options["drafter"] is None:
            assert set(metrics.accepted_lengths) == {1}
    if options["drafter"] == HEAD:
        lengths = [length for output in outputs for length in output.metrics.accepted_lengths]
        assert sum(lengths) > 1.5 * len(lengths)
