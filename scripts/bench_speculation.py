"""Does speculation pay? Tokens/s of drafters over plain decoding, prompt by prompt, in one interleaved run.

    python scripts/bench_speculation.py                                    # the bundled MT-Bench prompts
    python scripts/bench_speculation.py --prompts scripts/data/repeat_prompts.jsonl
    python scripts/bench_speculation.py --prompts question.jsonl --drafters auto self:6
    python scripts/bench_speculation.py --sampling                         # the cost of sampling a step

Prefill is left out. Each prompt is answered by every contender in turn (the order rotates), so that a
machine's moods fall on all of them; quoted are the mean of tokens/s over the prompts, as a ratio.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.draft import NgramDrafter
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.files.prompts import read_prompts
from specmemo_jax.llama.kv import capacity_of

DATA = Path(__file__).parent.parent / "tests" / "data" / "mt_bench_reference.jsonl"
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition_penalty": {"repetition": 1.1},
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 0.7, "top_k": 40},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "together": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition": 1.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=Path, help="JSONL as specmemo generate reads it")
    parser.add_argument("--drafters", nargs="+", default=["auto"])
    parser.add_argument("--tree-nodes", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--sampling", action="store_true", help="the cost of sampling a step instead")
    parser.add_argument("--nodes", nargs="+", type=int, default=[8, 16], help="with --sampling: T")
    parser.add_argument("--rounds", type=int, default=15, help="with --sampling")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{options.model}, {options.dtype} on {device.device_kind} ({device.platform}), jax {jax.__version__}"
    )
    if options.sampling:
        sampling_table(options)
    else:
        speculation_table(options)


def speculation_table(options: argparse.Namespace) -> None:
    names = [None, *options.drafters]
    llms = [
        LLM(
            options.model,
            drafter=name,
            tree_nodes=options.tree_nodes if name else None,
            dtype=options.dtype,
            max_context=2048,
        )
        for name in names
    ]
    prompts = _prompts(options, llms[0])[: options.limit]
    params = SamplingParams(temperature=0, max_tokens=options.new_tokens)
    speeds: list[list[float]] = [[] for _ in names]
    counts = [[0, 0] for _ in names]  # tokens, steps
    differing = 0
    for llm in llms:
        llm.generate(prompts[:1], params)  # compile, warm up
    for place, prompt in enumerate(prompts):
        answers: dict[int, tuple[int, ...]] = {}
        for turn in range(len(llms)):
            i = (place + turn) % len(llms)
            (output,) = llms[i].generate([prompt], params)
            answers[i] = output.outputs[0].token_ids
            if output.metrics.steps:
                speeds[i].append(output.metrics.tokens_per_second)
                counts[i][0] += sum(output.metrics.accepted_lengths)
                counts[i][1] += output.metrics.steps
        differing += len(set(answers.values())) > 1
    base = statistics.mean(speeds[0])
    print(f"{len(prompts)} prompts, up to {options.new_tokens} tokens each; answers that differ: {differing}")
    heads = ("tokens/s", "x vanilla", "median x", "worst x", "best x", "tokens a step")
    print(" " * 12 + "".join(f"{head:>14}" for head in heads))
    for name, speed, (tokens, steps) in zip(names, speeds, counts, strict=True):
        each = [a / b for a, b in zip(speed, speeds[0], strict=True)]
        ratios = (statistics.mean(speed) / base, statistics.median(each), min(each), max(each))
        figures = (f"{statistics.mean(speed):.1f}", *(f"{x:.2f}" for x in (*ratios, tokens / steps)))
        print(f"{name or 'vanilla':<12}" + "".join(f"{figure:>14}" for figure in figures))


def _prompts(options: argparse.Namespace, llm: LLM) -> list[list[int]]:
    """Token ids; of conversations with several turns, the first."""
    if options.prompts is None:
        return [json.loads(line)["prompt_ids"] for line in DATA.read_text().splitlines()]
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    prompts = []
    for record in read_prompts(options.prompts):
        messages = record.messages or ({"role": "user", "content": record.text or ""},)
        prompts.append(list(record.token_ids or tokenizer.chat_ids(messages)))
    return prompts


def sampling_table(options: argparse.Namespace) -> None:
    """Milliseconds of the whole speculative step at S = 512, every kind of sampling over greedy."""
    prompt = json.loads(DATA.read_text().splitlines()[0])["prompt_ids"][:100]
    for nodes in options.nodes:
        with LLM(options.model, drafter=NgramDrafter(nodes), dtype=options.dtype, max_context=480) as llm:
            runs = {kind: _stepper(llm.engine, prompt, fields) for kind, fields in KINDS.items()}
            times: dict[str, list[float]] = {kind: [] for kind in runs}
            for _ in range(options.rounds):
                for kind, run in runs.items():
                    times[kind].append(run())
        print(f"\nT = {nodes}, batch 1, median of {options.rounds} rounds of 8 steps")
        base = statistics.median(times["greedy"])
        for kind, values in times.items():
            paired = statistics.median(a / b for a, b in zip(values, times["greedy"], strict=True))
            middle = statistics.median(values)
            print(f"{kind:<20}{middle:>9.2f} ms{middle / base:>8.3f} (paired {paired:.3f})")


def _stepper(engine: Engine, prompt: list[int], fields: dict[str, Any]) -> Any:
    """A function that times 8 steps from the same state again and again; milliseconds a step."""
    engine.close()
    engine.admit(0, Request(prompt, 300))
    state = engine.take_state()
    settings = state.rows.settings
    changed = {name: jnp.full_like(getattr(settings.sampling, name), value) for name, value in fields.items()}
    settings = dataclasses.replace(settings, sampling=dataclasses.replace(settings.sampling, **changed))
    state = dataclasses.replace(state, rows=dataclasses.replace(state.rows, settings=settings))
    step = engine.step_program(capacity_of(state.caches), bool(fields))
    held = [state]

    def run() -> float:
        state = held[0]
        lengths = jnp.full_like(state.rows.lengths, len(prompt))
        state = dataclasses.replace(state, rows=dataclasses.replace(state.rows, lengths=lengths))
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(8):
            state, out = step(engine.target.leaves, engine.draft_weights, state)
        jax.block_until_ready(out)
        elapsed = (time.perf_counter() - start) / 8 * 1e3
        held[0] = state
        return elapsed

    run()
    return run


if __name__ == "__main__":
    main()
