"""Planned against unbounded speculative decoding on MT-Bench: generation memory and tokens a second.

    python scripts/bench_memory.py                       # 40 bundled prompts, first turns
    python scripts/bench_memory.py --prompts mt_bench.jsonl --questions 80

One run, one drafter, answers interleaved: ``plan`` is this engine; ``unbounded`` allocates what published
decoders do (the whole context's cache from the start, prompts read in one piece with the logits of every
row, the tree's logits gathered by path); ``unbounded-last-row`` is that with the last prompt row's logits
only. A line of ``--prompts`` is {"turns": [...]} (MT-Bench), both turns are asked. Memory is printed
twice: the plan's promise for any request up to the context, and what was really there for these: the
live arrays and the compiler's figure for the hungriest program that ran.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from specmemo_jax import LLM, RequestOutput, SamplingParams
from specmemo_jax.llm import Policy

BUNDLED = Path(__file__).parent.parent / "tests" / "data" / "mt_bench_reference.jsonl"
POLICIES: tuple[Policy, ...] = ("plan", "unbounded", "unbounded-last-row")
MIB = 2**20


def seconds(output: RequestOutput) -> float:
    """Of a whole request, its prefill included."""
    return output.metrics.time_to_first_token_s + output.metrics.decode_s


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=Path, help='JSONL of {"turns": [...]}')
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--max-context", type=int, default=2048)
    parser.add_argument("--drafter", default="ngram")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    params = SamplingParams(temperature=0, max_tokens=options.new_tokens)
    engines = {
        policy: LLM(
            options.model,
            drafter=options.drafter,
            dtype=options.dtype,
            max_context=options.max_context,
            new_tokens=options.new_tokens,
            policy=policy,
            adaptive=False,
        )
        for policy in POLICIES
    }
    if len({llm.plan.drafter for llm in engines.values()}) > 1:
        parser.error("the planner chose different drafters; --drafter with one shape would work")
    conversations = questions(options)
    times: dict[Policy, list[float]] = {policy: [] for policy in POLICIES}
    decode: dict[Policy, list[float]] = {policy: [] for policy in POLICIES}
    live: dict[Policy, int] = dict.fromkeys(POLICIES, 0)
    tokens, different, longest = [], 0, 0
    for place, turns in enumerate(tqdm(conversations, disable=None, leave=False)):
        said: list[dict[str, str]] = []
        for turn in turns:
            asked = [*said, {"role": "user", "content": turn}] if isinstance(turn, str) else turn
            outputs = {}
            for policy in (*POLICIES[place % 3 :], *POLICIES[: place % 3]):
                llm = engines[policy]
                run: Any = llm.chat if isinstance(turn, str) else llm.generate
                (outputs[policy],) = run([asked], params)
                live[policy] = max(live[policy], llm.engine.live_generation_bytes)
                llm.engine.close()
            ids = [output.outputs[0].token_ids for output in outputs.values()]
            different += sum(other != ids[0] for other in ids[1:])
            longest = max(longest, len(outputs["plan"].prompt_token_ids))
            tokens.append(len(ids[0]))
            for policy, output in outputs.items():
                times[policy].append(seconds(output))
                decode[policy].append(output.metrics.decode_s)
            if isinstance(turn, str):
                said = [*asked, {"role": "assistant", "content": outputs["plan"].outputs[0].text}]
    first = engines["plan"].plan
    print(
        f"{len(tokens)} answers of {options.new_tokens} tokens at most, prompts up to {longest} tokens, "
        f"max_context {options.max_context}, {options.dtype}, {first.shapes.drafter}"
    )
    print(f"answers that differ from the plan's: {different}")
    spent = {policy: sum(times[policy]) for policy in POLICIES}
    stepping = {policy: sum(decode[policy]) for policy in POLICIES}
    for policy in POLICIES:
        promised = engines[policy].plan.generation_bytes
        print(
            f"{policy:<20} promised {promised / MIB:7.1f} MiB, live {live[policy] / MIB:7.1f} MiB, "
            f"{sum(tokens) / spent[policy]:6.1f} tok/s, decoding alone {sum(tokens) / stepping[policy]:6.1f}"
        )
        if policy == "plan":
            continue
        ratios = [a / b for a, b in zip(times[policy], times["plan"], strict=True)]
        print(
            f"    the plan: {1 - first.generation_bytes / promised:.1%} less promised, "
            f"{1 - live['plan'] / live[policy]:.1%} less live, at {spent[policy] / spent['plan']:.3f} of its "
            f"throughput (median of answers {statistics.median(ratios):.3f}, "
            f"decoding alone {stepping[policy] / stepping['plan']:.3f})"
        )
    for llm in engines.values():
        llm.close()
    return int(different > 0 and options.dtype == "float32")


def questions(options: argparse.Namespace) -> list[list]:
    """Each a list of turns: texts of a conversation, or one prompt's ids."""
    file = options.prompts or BUNDLED
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][: options.questions]
    return [row["turns"] if "turns" in row else [row["prompt_ids"]] for row in rows]


if __name__ == "__main__":
    sys.exit(main())
