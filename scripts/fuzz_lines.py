"""Any JSON in any field, through both doors that read lines: every line becomes its own row or its own error.

    python scripts/fuzz_lines.py --lines 20000 --answered 500

Through the readers of `specmemo batch` and `specmemo generate --prompts` without a model, and through batches
of a tiny one. Exits with 1 at the first internal error, which it shows. Needs the extra ``test``.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from strange_lines import BATCH_LINES, PROMPT_LINES, encoded  # pyright: ignore[reportMissingImports]

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.batch.lines import read_lines
from specmemo_jax.cli.sampling import turn_params
from specmemo_jax.errors import RequestError
from specmemo_jax.files.json_lines import row_of
from specmemo_jax.files.prompts import read_prompts
from specmemo_jax.testing import TINY, tiny_llama, tiny_tokenizer

TOGETHER = 20  # lines of a file
GREEDY = SamplingParams(temperature=0, max_tokens=4)
DEFAULTS = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0, "max_tokens": 4}
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def examples(lines: int) -> Any:
    """Enough files for so many lines; nothing is shrunk, so that the counts are what was tried."""
    return settings(
        max_examples=-(-lines // TOGETHER), deadline=None, database=None, suppress_health_check=CHECKS,
        phases=(Phase.generate,),
    )  # fmt: skip


def files_of(lines: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """As many lines as a file has."""
    return st.lists(lines, min_size=TOGETHER, max_size=TOGETHER)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=20_000, help="for each reader, without a model")
    parser.add_argument("--answered", type=int, default=500, help="through a tiny model")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        source, results = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")

        @examples(options.lines)
        @given(files_of(BATCH_LINES))
        def read_batch(values: list[Any]) -> None:
            source.write_bytes(b"".join(encoded(value) + b"\n" for value in values))
            found = list(read_lines(source, frozenset(("m",)), GREEDY))
            assert len(found) == len(values)
            counts["batch lines read"] += len(found)
            counts["batch lines with an error of their own"] += sum(line.error is not None for line in found)

        @examples(options.lines)
        @given(files_of(PROMPT_LINES))
        def read_each_prompt(values: list[Any]) -> None:
            for value in values:
                source.write_bytes(encoded(value) + b"\n")
                counts["prompt lines read"] += 1
                try:
                    records = read_prompts(source)
                    turn_params(records, DEFAULTS)
                except RequestError as error:
                    counts["prompt lines with an error of their own"] += "line 1" in str(error)
                    counts["prompt lines with an error that names no line"] += "line 1" not in str(error)
                else:
                    json.loads(row_of({"id": records[0].id, **records[0].labels}))

        with LLM(TINY, tiny_llama(), max_context=96, max_batch=4, drafter="ngram", tree_nodes=4) as llm:
            llm.tokenizer = tiny_tokenizer()

            @examples(options.answered)
            @given(files_of(BATCH_LINES))
            def answer(values: list[Any]) -> None:
                source.write_bytes(b"".join(encoded(value) + b"\n" for value in values))
                results.unlink(missing_ok=True)
                summary = llm.run_batch(source, results, sampling_params=GREEDY)
                assert len(results.read_bytes().splitlines()) == len(values)
                assert llm.run_batch(source, results, sampling_params=GREEDY, resume=True).rows == 0
                counts["lines through a model"] += summary.rows
                counts["of them answered"] += summary.answered

            read_batch()
            read_each_prompt()
            answer()
    for what, count in counts.items():
        print(f"{count:>7} {what}")
    print("0 internal errors")
    return int(counts["prompt lines with an error that names no line"] > 0)


if __name__ == "__main__":
    sys.exit(main())
