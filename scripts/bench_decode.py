"""Decoding speed of one model, side by side in one interleaved run; medians and ratios.

Three tables: tokens/s (vanilla and n-gram drafted, each dtype; transformers + torch with the same
weights where torch is installed; the memory-bandwidth roofline measured between the rounds), the
cost of verify(T) over verify(1), and XLA's memory figures of the step.

    python scripts/bench_decode.py                     # all three
    python scripts/bench_decode.py --tables verify --nodes 1 8 --batches 1
"""

import argparse
import gc
import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from specmemo_jax.checkpoints import Checkpoint, open_checkpoint, resolve
from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.devices.compiler import enable_compilation_cache
from specmemo_jax.draft import NgramDrafter, make_drafter
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.llama.packing import Target, pack
from specmemo_jax.measure.timing import part_filled
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes

REFERENCE = Path(__file__).parent.parent / "tests" / "data" / "mt_bench_reference.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tables", nargs="+", default=["decode", "verify", "memory"])
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--capacities", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=2, help="MT-Bench prompts a round")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--no-torch", action="store_true", help="leave transformers + torch out")
    options = parser.parse_args()
    enable_compilation_cache()
    checkpoint = open_checkpoint(resolve(options.model).path)
    device = jax.devices()[0]
    print(f"{options.model} on {device.device_kind} ({device.platform}), jax {jax.__version__}", flush=True)
    if "decode" in options.tables:
        decode_table(checkpoint, options)
    for name, table in (("verify", verify_table), ("memory", memory_table)):
        if name in options.tables:
            for dtype in options.dtypes:
                table(pack(checkpoint.config, checkpoint.tensors(), jnp.dtype(dtype)), options)
                gc.collect()


# ---------------------------------------------------------------- decode


def decode_table(checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Tokens/s of whole answers, the first token aside."""
    prompts = [row["prompt_ids"] for row in map(json.loads, REFERENCE.read_text().splitlines())][
        : 8 * options.prompts : 8
    ]
    runs: dict[str, Callable[[], tuple[int, float]]] = {}
    bytes_read: dict[str, int] = {}
    for dtype in options.dtypes:
        target = pack(checkpoint.config, checkpoint.tensors(), jnp.dtype(dtype))
        for name in (None, "ngram"):
            drafter = make_drafter(name, dtype=dtype)
            label = f"{name or 'vanilla'} {dtype}"
            runs[label] = engine_run(target, drafter, prompts, options.new_tokens)
        bytes_read[dtype] = target.num_bytes
    if not options.no_torch and importlib.util.find_spec("torch"):
        for dtype in options.dtypes:
            runs[f"transformers {dtype}"] = torch_run(checkpoint.path, dtype, prompts, options.new_tokens)
    for run in runs.values():
        run()  # compile, warm up
    bandwidth = bandwidth_probe()
    bandwidth()
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    reads: list[float] = []
    for _ in range(options.rounds):
        for name, run in runs.items():
            tokens, seconds = run()
            speeds[name].append(tokens / seconds)
        reads.append(bandwidth())
    read = statistics.median(reads)
    print(f"\ndecode, batch 1, {len(prompts)} MT-Bench prompts, {options.new_tokens} new tokens each, "
          f"median of {options.rounds} rounds")  # fmt: skip
    best = max((statistics.median(v) for k, v in speeds.items() if k.startswith("transformers")), default=0.0)
    base = statistics.median(speeds[f"vanilla {options.dtypes[0]}"])
    print(f"{'':<24}{'tokens/s':>10}{'x first':>9}{'x transformers best':>21}{'of roofline':>13}")
    for name, values in speeds.items():
        speed = statistics.median(values)
        roofline = read / bytes_read[name.split()[1]] if name.startswith("vanilla") else None
        print(
            f"{name:<24}{speed:>10.1f}{speed / base:>9.2f}"
            + (f"{speed / best:>21.2f}" if best else f"{'-':>21}")
            + (f"{speed / roofline:>13.0%}" if roofline else f"{'-':>13}")
        )
    print(f"roofline: weights read once a token at {read / 1e9:.1f} GB/s, measured between the rounds")


def engine_run(
    target: Target, drafter: Any, prompts: list[list[int]], new_tokens: int
) -> Callable[[], tuple[int, float]]:
    """Greedy answers through the engine; decoded tokens and seconds, prefill aside."""
    plan = lay_out(
        Shapes(
            target.config, dtype=target.dtype.name, platform=target.platform, context=1024, drafter=drafter
        )
    )
    engine = Engine(target, plan)

    def run() -> tuple[int, float]:
        tokens, seconds = 0, 0.0
        for prompt in prompts:
            engine.admit(0, Request(prompt, new_tokens))
            start = time.perf_counter()
            while not (log := engine.rows[0]) or not log.finished:
                engine.burst()
            seconds += time.perf_counter() - start
            tokens += len(engine.release(0).new_ids) - 1
        return tokens, seconds

    return run


def torch_run(
    path: Path, dtype: str, prompts: list[list[int]], new_tokens: int
) -> Callable[[], tuple[int, float]]:
    """The same answers by transformers' ``generate``, in a process of its own: torch's threads and
    XLA's slow each other down in one process even when only one of them works."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(
        target=_torch_worker, args=(theirs, path, dtype, prompts, new_tokens), daemon=True
    ).start()

    def run() -> tuple[int, float]:
        ours.send(True)
        return ours.recv()

    return run


def _torch_worker(pipe: Any, path: Path, dtype: str, prompts: list[list[int]], new_tokens: int) -> None:
    """Answer once for each message; prefill is timed apart and taken off."""
    from _torch_model import timed_answers, torch_model

    model = torch_model(path, dtype)

    def generate(prompt: list[int], tokens: int) -> float:
        return timed_answers(model, [prompt], tokens)

    while pipe.recv():
        seconds = sum(generate(prompt, new_tokens) - generate(prompt, 1) for prompt in prompts)
        pipe.send((len(prompts) * (new_tokens - 1), seconds))


def bandwidth_probe() -> Callable[[], float]:
    """Bytes/s at which this device reads a matrix larger than its caches, by matrix-vector products."""
    weights = jnp.ones((262144, 576), jnp.float32)
    vector = jnp.ones((576,), jnp.float32)
    multiply = jax.jit(lambda w, v: w @ v)
    multiply(weights, vector).block_until_ready()

    def probe() -> float:
        best = 1e9
        for _ in range(3):
            start = time.perf_counter()
            multiply(weights, vector).block_until_ready()
            best = min(best, time.perf_counter() - start)
        return weights.nbytes / best

    return probe


# ---------------------------------------------------------------- verify, memory


def engines(target: Target, batch: int, capacity: int, nodes: list[int]) -> Iterator[tuple[int, Engine]]:
    """An engine a tree size, its cache exactly ``capacity`` slots."""
    for T in nodes:
        drafter = NgramDrafter(num_nodes=T) if T > 1 else None
        shapes = Shapes(
            target.config,
            target.dtype.name,
            target.platform,
            context=capacity - 64,
            batch=batch,
            drafter=drafter,
            capacities=(capacity,),
        )
        yield T, Engine(target, lay_out(shapes))


def verify_table(target: Target, options: argparse.Namespace) -> None:
    """Median time of a whole step (draft, verify, accept, commit) with T nodes over plain decoding."""
    print(f"\nverify(T) / verify(1), {target.dtype.name}, median of {options.rounds} rounds (ms in brackets)")
    for batch in options.batches:
        for capacity in options.capacities:
            cases = []
            for T, engine in engines(target, batch, capacity, options.nodes):
                step = engine.step_program(capacity)
                state = part_filled(engine, capacity)
                state, _ = step(target.leaves, engine.draft_weights, state)
                jax.block_until_ready(state)  # a program's first step takes several times the next
                cases.append((T, step, state, []))
            for _ in range(options.rounds):
                for i, (T, step, state, times) in enumerate(cases):
                    start = time.perf_counter()
                    state, _ = step(target.leaves, engine.draft_weights, state)
                    jax.block_until_ready(state)
                    times.append(time.perf_counter() - start)
                    cases[i] = (T, step, state, times)
            medians = {T: statistics.median(times) for T, _, _, times in cases}
            first = medians[options.nodes[0]]
            cells = "  ".join(f"T={T}: {m / first:.2f} ({m * 1e3:.1f})" for T, m in medians.items())
            print(f"B={batch} S={capacity}  {cells}", flush=True)


def memory_table(target: Target, options: argparse.Namespace) -> None:
    """XLA's own figures of the step at the largest capacity, T = 16."""
    capacity = max(options.capacities)
    print(f"\nstep memory by XLA, {target.dtype.name}, S={capacity}, T=16 (MiB)")
    for batch in options.batches:
        ((_, engine),) = engines(target, batch, capacity, [16])
        figures = compiled_memory(engine.step_program(capacity))
        state = engine.programs.abstract_state(capacity)
        cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.caches))
        print(
            f"B={batch}  cache {cache / 2**20:.1f}, aliased {figures.aliased / 2**20:.1f}, "
            f"temporaries {figures.temporaries / 2**20:.1f}, code {figures.code / 2**20:.1f}, "
            f"plan's bound of temporaries {engine.plan.temporary_bytes / 2**20:.1f}"
        )


if __name__ == "__main__":
    main()
