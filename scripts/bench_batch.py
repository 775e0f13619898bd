"""Tokens a second against batch size, plain and speculative; and what refilling rows of mixed lengths costs.

    python scripts/bench_batch.py                              # batch 1 to 32, 40 bundled MT-Bench prompts
    python scripts/bench_batch.py --batches 1,10 --drafter self:6
    python scripts/bench_batch.py --refill --batches 8         # 200 rows of mixed lengths against equal ones
    python scripts/bench_batch.py --mixing --batches 4,10      # what prompts read inside the steps could save
    python scripts/bench_batch.py --model llama-2-7b-chat --random-weights --dtype bfloat16 --batches 1,10

One run; for each batch size a plain engine, a speculative one and, as a control, a second plain one answer
the same rows over the same weights, a burst of each in turn, more rows than the batch holds, so that finished
rows are refilled. Speeds count the answers' tokens over the whole time, prefill included. Trees move as they
pay (adaptive), as a user has them. Ratios are over the first plain engine, medians of the rounds', of which
the least and the most stand beside them; the control's tells how much of a ratio is noise.

``--mixing`` bounds from above what chunks that hold the rows' steps, too, would save: such a pass takes at
least as long as a chunk, holds fewer tokens of the prompt by the batch, and saves one step.
``--random-weights`` takes a zoo model's shapes without its weights: what a step costs is the same, but
answers are noise, and guesses fail.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from specmemo_jax import LLM, LlamaConfig, RequestOutput, SamplingParams
from specmemo_jax.checkpoints.zoo import zoo_config
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.memory.plan import lay_out

BUNDLED = Path(__file__).parent.parent / "tests" / "data" / "mt_bench_reference.jsonl"


def main() -> int:
    """Measure and print; 1 if a token differs or speculation loses more than 2%."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--drafter", default="ngram")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", default="1,2,4,8,10,16,32")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="rows a place of the batch, 8 at least in all")
    parser.add_argument("--random-weights", action="store_true", help="the model's shapes alone")
    parser.add_argument("--refill", action="store_true")
    parser.add_argument("--mixing", action="store_true")
    options = parser.parse_args()
    prompts = [json.loads(line)["prompt_ids"] for line in BUNDLED.read_text(encoding="utf-8").splitlines()]
    room = options.max_context - options.new_tokens
    if options.random_weights:
        vocabulary = zoo_config(options.model).vocab_size
        prompts = [[token % vocabulary for token in prompt] for prompt in prompts]
    prompts = [ids for ids in prompts if len(ids) <= room]
    batches = [int(text) for text in options.batches.split(",")]
    measure = mixing if options.mixing else refilled if options.refill else compared
    # Starts the backend: on a GPU its pool would be as large as the first plan, and the engines share it.
    device = jax.devices()[0]
    weights = ", random weights" if options.random_weights else ""
    print(
        f"{options.model}{weights}, {options.dtype} on {device.device_kind} ({device.platform}), "
        f"jax {jax.__version__}",
        flush=True,
    )
    return measure(options, prompts, batches)


def engine(options: argparse.Namespace, batch: int, drafter: str | None) -> LLM:
    """One that is planned for the batch."""
    config = zoo_config(options.model) if options.random_weights else None
    return LLM(
        config or options.model, config and random_weights(config, options.dtype), drafter=drafter,
        dtype=options.dtype, max_batch=batch, max_context=options.max_context, new_tokens=options.new_tokens,
    )  # fmt: skip


@functools.cache
def random_weights(config: LlamaConfig, dtype: str) -> dict[str, np.ndarray]:
    """Tensors of noise by name, all views of one buffer as large as the largest; norms are 1."""
    shapes = config.tensor_shapes()
    largest = max(map(math.prod, shapes.values()))
    noise = 0.02 * np.random.default_rng(0).standard_normal(2 * largest, np.float32)
    noise = noise.astype(jnp.dtype(dtype))
    tensors = {}
    for place, (name, shape) in enumerate(shapes.items()):
        size, start = math.prod(shape), place * 7919 % largest
        flat = np.ones(size, noise.dtype) if name.endswith("norm.weight") else noise[start : start + size]
        tensors[name] = flat.reshape(shape)
    return tensors


def take_weights(llm: LLM, first: LLM) -> LLM:
    """``llm``, over the weights of ``first``: its own may lie better or worse in memory, and fill a GPU."""
    if llm is not first:
        own, engine = llm.target, llm.engine
        llm.target = engine.target = engine.runner.target = first.target
        engine.draft_weights = () if engine.drafter is None else engine.drafter.weights(first.target)
        engine.runner.draft_weights = engine.draft_weights
        for leaf in own.leaves:
            leaf.delete()
    return llm


def tokens_of(outputs: Iterable[RequestOutput]) -> int:
    """New tokens in all."""
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def timed(llm: LLM, prompts: list, params: list[SamplingParams]) -> tuple[float, list[RequestOutput]]:
    """Tokens a second of one call, and its answers."""
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    return tokens_of(outputs) / (time.perf_counter() - began), outputs


def by_turns(
    llms: dict[str, LLM], prompts: list, params: SamplingParams
) -> dict[str, tuple[float, list[RequestOutput]]]:
    """What `timed` gives of each, a burst of each in turn: a machine's moods meet them all."""
    jobs = {
        name: [llm.job(prompt, params, place) for place, prompt in enumerate(prompts)]
        for name, llm in llms.items()
    }
    running = {name: llm.run_jobs(jobs[name]) for name, llm in llms.items()}
    seconds = dict.fromkeys(llms, 0.0)
    while running:
        for name in list(running):
            began = time.perf_counter()
            if next(running[name], None) is None:
                del running[name]
            seconds[name] += time.perf_counter() - began
    found = {}
    for name, own in jobs.items():
        outputs = [job.output for job in own if job.output is not None]
        found[name] = tokens_of(outputs) / seconds[name], outputs
    return found


def compared(options: argparse.Namespace, prompts: list, batches: list[int]) -> int:
    """The table over batch sizes."""
    params = SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=options.random_weights)
    first, lost = {}, 0
    print(
        f"{'batch':>5}{'plain':>9}{'specul.':>9}{'ratio':>7}{'rounds':>12}{'control':>9}{'rounds':>12}"
        f"{'accepted':>10}{'mean tree':>10}  over batch 1"
    )
    for batch in batches:
        rows = [prompts[n % len(prompts)] for n in range(max(8, options.rows * batch))]
        with contextlib.ExitStack() as stack:
            llms: dict[str, LLM] = {}
            for name, drafter in (("plain", None), ("speculative", options.drafter), ("control", None)):
                llm = stack.enter_context(engine(options, batch, drafter))
                llms[name] = take_weights(llm, llms.get("plain", llm))
            for _ in range(2):  # they compile, and find the trees
                by_turns(llms, rows, params)
            rounds = [by_turns(llms, rows, params) for _ in range(options.rounds)]
        speeds = {name: [found[name][0] for found in rounds] for name in llms}
        best = {name: statistics.median(speeds[name]) for name in ("plain", "speculative")}
        ratio, spread = ratios(speeds["speculative"], speeds["plain"])
        control, control_spread = ratios(speeds["control"], speeds["plain"])
        metrics = [output.metrics for found in rounds for output in found["speculative"][1]]
        steps = sum(each.steps for each in metrics)
        accepted = sum(sum(each.accepted_lengths) for each in metrics) / steps
        nodes = sum(sum(each.tree_nodes) for each in metrics) / steps
        first = first or best
        over = ", ".join(f"{best[name] / first[name]:.2f}x {name}" for name in best)
        print(
            f"{batch:>5}{best['plain']:>9.1f}{best['speculative']:>9.1f}{ratio:>7.2f}{spread:>12}"
            f"{control:>9.2f}{control_spread:>12}{accepted:>10.2f}{nodes:>10.1f}  {over}",
            flush=True,
        )
        answers = [
            {name: [o.outputs[0].token_ids for o in outputs] for name, (_, outputs) in found.items()}
            for found in rounds
        ]
        different = max(
            sum(a != b for a, b in zip(found["plain"], found["speculative"], strict=True))
            for found in answers
        )
        lost += ratio < 0.98 or (different > 0 and options.dtype == "float32")
        if different:
            print(f"      {different} of {len(rows)} answers differ")
    return int(lost > 0)


def ratios(speeds: list[float], over: list[float]) -> tuple[float, str]:
    """The median of the rounds' ratios, and their least and most."""
    each = [speed / other for speed, other in zip(speeds, over, strict=True)]
    return statistics.median(each), f"{min(each):.2f}-{max(each):.2f}"


def refilled(options: argparse.Namespace, prompts: list, batches: list[int]) -> int:
    """200 rows whose answers' lengths differ, and the same tokens in rows of one length."""
    rows = [prompts[n % len(prompts)] for n in range(200)]
    lengths = [4 + (n * 37) % (2 * options.new_tokens - 8) for n in range(200)]
    equal = [sum(lengths) // 200 + (n < sum(lengths) % 200) for n in range(200)]
    for batch in batches:
        with engine(options, batch, options.drafter) as llm:
            speeds: dict[str, list[float]] = {"mixed": [], "equal": []}
            for number in range(options.rounds + 1):
                some = slice(None) if number else slice(0, 4 * batch)  # the first compiles
                for name, most in (("mixed", lengths), ("equal", equal)):
                    asked = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in most]
                    speed, _ = timed(llm, rows[some], asked[some])
                    if number:
                        speeds[name].append(speed)
        ratio = statistics.median(m / e for m, e in zip(speeds["mixed"], speeds["equal"], strict=True))
        print(
            f"batch {batch}: mixed lengths {statistics.median(speeds['mixed']):.1f} tok/s, equal "
            f"{statistics.median(speeds['equal']):.1f}, ratio {ratio:.3f}",
            flush=True,
        )
    return 0


def mixing(options: argparse.Namespace, prompts: list, batches: list[int]) -> int:
    """The most that reading chunks inside the steps would save, of the time of one answer."""
    new, ids = options.new_tokens, [token for prompt in prompts for token in prompt]
    for batch in batches:
        with engine(options, batch, None) as llm:
            for row in range(batch):
                llm.engine.admit(row, Request(prompts[row % len(prompts)], new))
            step = median_of(lambda: llm.engine.burst(4), options.rounds) / 4
            for width in llm.plan.shapes.chunks:
                if width <= batch:
                    continue
                chunk = chunk_seconds(options, llm, ids, width)
                apart, mixed = (
                    statistics.mean(math.ceil(len(prompt) / room) for prompt in prompts)
                    for room in (width, width - batch)
                )
                before = apart * chunk + new / batch * step
                after = mixed * chunk + max(0, new / batch - mixed) * step
                print(
                    f"batch {batch}: step {step * 1e3:.1f} ms, chunk of {width} {chunk * 1e3:.1f} ms, "
                    f"{apart:.1f} of them an answer ({mixed:.1f} where they hold the rows, too): at most "
                    f"{1 - after / before:.1%} of an answer's time",
                    flush=True,
                )
    return 0


def chunk_seconds(options: argparse.Namespace, llm: LLM, ids: list[int], width: int) -> float:
    """Of one chunk, until its token is read."""
    one = Engine(llm.target, lay_out(dataclasses.replace(llm.plan.shapes, chunks=(width, width))))
    with contextlib.closing(one):
        return median_of(lambda: one.admit(0, Request(ids[:width], 1)), options.rounds)


def median_of(call: Callable[[], object], rounds: int) -> float:
    """Seconds of a call, the median of ``rounds`` after two that compile."""
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


if __name__ == "__main__":
    sys.exit(main())
