"""Float32 greedy token ids against a reference, for every tree and batch size; exit 1 on any difference.

    python scripts/check_equality.py                                   # the bundled MT-Bench reference
    python scripts/check_equality.py --reference FILE.jsonl --dtype bfloat16

A reference line holds ``prompt_ids`` and ``new_ids`` (here: transformers + torch, float32, 64 tokens).
In bfloat16 and float16 near-ties may flip: the differing rows are counted and nothing fails.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from specmemo_jax import LLM, RequestOutput, SamplingParams
from specmemo_jax.draft import NgramDrafter
from specmemo_jax.draft.ngram import chain

REFERENCE = Path(__file__).parent.parent / "tests" / "data" / "mt_bench_reference.jsonl"
DRAFTERS = {
    "vanilla": None,
    "tree 4": NgramDrafter(4),
    "tree 8": NgramDrafter(8),
    "tree 16": NgramDrafter(16),
    "chain 8": chain(8),
}


def advance(bar: tqdm, _: RequestOutput) -> None:
    bar.update()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--drafters", nargs="+", default=list(DRAFTERS), choices=list(DRAFTERS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--limit", type=int, help="only the first rows of the reference")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.reference.read_text().splitlines()][: options.limit]
    prompts = [row["prompt_ids"] for row in rows]
    longest = max(len(row["prompt_ids"]) + 64 for row in rows)
    failed = 0
    for batch in options.batches:
        for name in options.drafters:
            start = time.perf_counter()
            with (
                LLM(
                    options.model,
                    drafter=DRAFTERS[name],
                    dtype=options.dtype,
                    max_batch=batch,
                    max_context=longest,
                ) as llm,
                tqdm(total=len(rows), disable=None, leave=False) as bar,
            ):
                outputs = llm.generate(prompts, SamplingParams(max_tokens=64), progress=partial(advance, bar))
            wrong = [i for i, o in enumerate(outputs) if list(o.outputs[0].token_ids) != rows[i]["new_ids"]]
            steps = sum(o.metrics.steps for o in outputs)
            tokens = sum(sum(o.metrics.accepted_lengths) for o in outputs)
            print(
                f"{options.dtype} batch {batch} {name:<8} equal {len(rows) - len(wrong)}/{len(rows)}  "
                f"mean accepted length {tokens / steps:.3f}  ({time.perf_counter() - start:.0f} s)"
                + (f"  differing rows: {wrong}" if wrong else ""),
                flush=True,
            )
            failed += len(wrong)
    return int(failed > 0 and options.dtype == "float32")


if __name__ == "__main__":
    sys.exit(main())
