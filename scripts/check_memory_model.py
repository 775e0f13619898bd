"""The memory model against the compiler, over plans drawn at random; exit 1 if a bar is missed.

    python scripts/check_memory_model.py                                # 200 plans on CPU, 30 of them in full
    python scripts/check_memory_model.py --platform cuda:a100-80        # the same for a GPU by description
    python scripts/check_memory_model.py --jobs 2 --csv plans.csv --limit-seconds 1200

Every plan's programs are compiled from shapes alone: at its full depth for ``--full`` of them, with 2 layers
for the others. There the difference of theory and compiler at 2 layers is carried to the full depth, whose
theory is known. Bars: the theory's generation memory is never below the compiler's, over by a median of at
most 3%, and at worst by 10% or 16 MiB, whichever is larger. ``--csv`` is appended to as plans are done; it
keeps the compiler's figures, and plans that it holds already are priced and not compiled again.
"""

import argparse
import csv
import dataclasses
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp

from specmemo_jax import LlamaConfig
from specmemo_jax.checkpoints.zoo import zoo_config
from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.devices.table import find_device
from specmemo_jax.draft import Drafter, DraftModel, NgramDrafter, SelfDrafter, TreeShape
from specmemo_jax.draft.eagle import EagleDrafter
from specmemo_jax.draft.head_config import HeadConfig, default_taps, head_layer
from specmemo_jax.engine.programs import Programs, state_shardings
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.kv import SLOTS
from specmemo_jax.llama.packing import abstract_target
from specmemo_jax.memory.footprint import ProgramFootprint
from specmemo_jax.memory.plan import MemoryPlan, lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.mesh.axes import check_shards
from specmemo_jax.planning.prove import compile_target_for, lowerings, programs_for

TINY = LlamaConfig(
    vocab_size=256, hidden_size=64, ffn_size=128, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=16,
    max_context=8192,
)  # fmt: skip
TARGETS = (
    "tiny",
    "smollm2-135m-instruct",
    "tinyllama-1.1b-chat",
    "llama-3.2-1b-instruct",
    "llama-2-7b-chat",
    "llama-2-13b-chat",
    "llama-2-70b-chat",
)
DRAFTERS = ("none", "ngram tree", "ngram ladder", "ngram chain", "self", "draft model", "eagle", "eagle3")
ABRIDGED = 2  # layers
MEDIAN, WORST, SLACK = 1.03, 1.10, 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """One drawn plan; ``full``: compiled at its whole depth."""

    index: int
    target: str
    drafter: str
    dtype: str
    batch: int
    capacity: int
    nodes: int
    branches: int
    chunk: int
    shards: int
    parts: tuple[int | None, int | None]
    full: bool

    def plan(self, platform: str, layers: int | None) -> MemoryPlan:
        """Its shapes, with ``layers`` in place of the target's where given."""
        config = TINY if self.target == "tiny" else zoo_config(self.target)
        depth = config.num_layers if layers is None else min(layers, config.num_layers)
        config = dataclasses.replace(config, num_layers=depth, max_context=max(config.max_context, 2**14))
        device = find_device("cpu" if platform == "cpu" else platform.removeprefix("cuda:"))
        drafter = self.made(config, device.platform)
        slack = 0 if drafter is None else drafter.max_depth
        return lay_out(
            Shapes(
                config,
                dtype=self.dtype,
                platform="cpu" if platform == "cpu" else "gpu",
                batch=self.batch,
                context=self.capacity - slack - 1,
                drafter=drafter,
                chunks=(self.chunk,),
                score_nodes=self.parts[0],
                logit_nodes=self.parts[1],
                shards=self.shards,
            ),
            device,
        )

    def made(self, config: LlamaConfig, platform: str) -> Drafter | None:
        """The drafter; a draft model is a small one with the target's vocabulary."""
        T = self.nodes
        match self.drafter:
            case "none":
                return None
            case "ngram tree":
                return NgramDrafter(T)
            case "ngram chain":
                return NgramDrafter(T, branches=1)
            case "ngram ladder":
                ladder = ((4, 2), (T, 4)) if T > 4 else ((T, 2),)
                return NgramDrafter(T, branches=1, ladder=ladder, min_hit_rate=0.35)
        levels = min(T - 1, 4)
        branches = min(self.branches, T - 1)
        while 1 + branches + (levels - 1) * branches**2 < T:
            branches += 1
        shape = TreeShape(T, levels, branches)
        if self.drafter == "self":
            return SelfDrafter(1, shape)
        if self.drafter in ("eagle", "eagle3"):
            head = self.head(config)
            return EagleDrafter(head, lambda _: (), shape, self.dtype, platform=platform)
        small = LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=256, ffn_size=512, num_layers=2, num_heads=4,
            num_kv_heads=2, head_dim=64, max_context=2**15,
        )  # fmt: skip
        return DraftModel.of(abstract_target(small, jnp.dtype(self.dtype), platform), shape)

    def head(self, config: LlamaConfig) -> HeadConfig:
        """Of EAGLE's kinds, with sizes of its own that its index decides; its H is the target's."""
        rng = random.Random(self.index)
        D = rng.choice((config.head_dim, 64, 128))
        heads = rng.choice((config.num_heads, max(1, config.hidden_size // D)))
        shared = rng.choice([share for share in (1, 2, 4, 8) if heads % share == 0])
        ffn = rng.choice((config.ffn_size, config.hidden_size, 4 * config.hidden_size))
        layer = dataclasses.replace(
            head_layer(config), num_heads=heads, num_kv_heads=heads // shared, head_dim=D, ffn_size=ffn
        )
        vocab = rng.choice((None, None, config.vocab_size // 4, config.vocab_size - 1))
        own = bool(rng.getrandbits(1))
        kind = "eagle3" if self.drafter == "eagle3" else "eagle"
        return HeadConfig(kind, layer, default_taps(kind, config), vocab, own, fc_bias=rng.random() < 0.5)


def draw(seed: int, plans: int, full: int, platform: str, drafters: Sequence[str]) -> Iterator[Case]:
    """``plans`` cases with one of ``drafters``; the first ``full`` are compiled whole."""
    dtypes = ("bfloat16", "float32")
    if platform != "cpu":
        spec = find_device(platform.removeprefix("cuda:"))
        dtypes = tuple(d for d in ("bfloat16", "float16", "float32") if d in spec.dtypes)
    rng, index = random.Random(seed), 0
    while index < plans:
        drafter = rng.choice(drafters)
        nodes = 1 if drafter == "none" else rng.choice((2, 4, 8, 12, 16, 16, 24, 32, 48, 64))
        case = Case(
            index=index,
            target=rng.choice(TARGETS),
            drafter=drafter,
            dtype=rng.choice(dtypes),
            batch=rng.choice((1, 1, 2, 3, 4, 6, 8, 12, 16)),
            capacity=SLOTS * round(2 ** rng.uniform(1, 7)),
            nodes=nodes,
            branches=rng.choice((1, 2, 4)),
            chunk=rng.choice((32, 64, 128, 128)),
            shards=rng.choice((1, 1, 8)),
            parts=rng.choice(((None, None),) * 4 + ((32, None), (None, 8), (32, 8))),
            full=index < full,
        )
        config = TINY if case.target == "tiny" else zoo_config(case.target)
        try:
            check_shards(config, case.shards)
        except ConfigError:
            continue
        if case.capacity > 4 * nodes and case.chunk <= case.capacity:
            yield case
            index += 1


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's bytes at the depth compiled: its hungriest program and what persists."""

    index: int
    generation: int
    hungriest: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """Generation memory in bytes: theory and compiler, at the target's depth."""

    index: int
    theory: int
    compiled: int
    largest: str


def compare(case: Case, platform: str, found: Compiled) -> Result:
    """The theory's figure beside the compiler's, which is carried from 2 layers to the full depth."""
    whole = case.plan(platform, None)
    shown = whole if case.full else case.plan(platform, ABRIDGED)
    theory = _generation(whole)
    over = _generation(shown) - found.generation
    largest = max(_compiled(shown), key=lambda program: program.bytes).name
    return Result(case.index, theory, theory - over, largest)


def check(case: Case, platform: str, every_program: bool) -> Compiled:
    """Compile one case's programs."""
    began = time.monotonic()
    shown = case.plan(platform, None if case.full else ABRIDGED)
    spec = find_device("cpu" if platform == "cpu" else platform.removeprefix("cuda:"))
    programs = programs_for(shown, compile_target_for(spec, case.dtype, case.shards))
    persistent = persistent_bytes(programs)
    most, hungriest = 0, ""
    # Sampled programs hold all that greedy ones do, and larger trees most often all that smaller ones do.
    named = {f"step {case.nodes}", f"prefill {case.chunk}", max(_compiled(shown), key=lambda p: p.bytes).name}
    for name, lower in lowerings(programs):
        if every_program or name == "settle" or name in {f"{program}, sampled" for program in named}:
            extra = compiled_memory(programs.compile(lower())).extra
            most, hungriest = max((most, hungriest), (extra, name))
    return Compiled(case.index, persistent + most, hungriest, time.monotonic() - began)


def persistent_bytes(programs: Programs) -> int:
    """Bytes a device of what the programs keep, the target's weights left out, from their own shapes."""
    state = programs.abstract_state(programs.shapes.capacities[-1])
    weights = () if programs.drafter is None else programs.drafter.weight_shapes(programs.target)
    leaves = jax.tree.leaves(state)
    shapes = [leaf.shape for leaf in leaves]
    if programs.mesh is not None:
        places = jax.tree.leaves(state_shardings(programs.mesh, state))
        shapes = [place.shard_shape(leaf.shape) for place, leaf in zip(places, leaves, strict=True)]
    own = sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True))
    return own + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))


def _compiled(plan: MemoryPlan) -> list[ProgramFootprint]:
    """The programs that XLA compiles; the cache's growth on CPU is the host's, an array at a time."""
    return [program for program in plan.footprint.programs if program.name != "growth"]


def _generation(plan: MemoryPlan) -> int:
    """The theory's figure for the compiled programs."""
    persistent = sum(buffer.bytes for buffer in plan.buffers) - plan.weights_bytes
    return persistent + max(program.bytes for program in _compiled(plan))


def main() -> int:
    """Draw, compile, print; 1 if a bar is missed."""
    args = _options()
    drawn = draw(args.seed, args.plans, args.full, args.platform, args.drafters)
    cases = {case.index: case for case in drawn}
    print(_HEAD)
    done = dict(_read(args.csv, cases))
    results = {index: compare(cases[index], args.platform, done[index]) for index in sorted(done)}
    for index, result in results.items():
        print(_line(cases[index], result))
    waiting = [case for index, case in cases.items() if index not in done]
    deadline = time.monotonic() + args.limit_seconds
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), _begin, (args.platform,)) as pool:
        futures = [pool.submit(check, case, args.platform, args.every_program) for case in waiting]
        for case, future in zip(waiting, futures, strict=True):
            try:
                found = future.result(max(0.0, deadline - time.monotonic()))
            except TooLong:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            results[case.index] = compare(case, args.platform, found)
            print(_line(case, results[case.index]), flush=True)
            _write(args.csv, case, found)
    return _summary([results[i] for i in sorted(results)], len(cases))


def _begin(platform: str) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", 8)


def _summary(results: list[Result], wanted: int) -> int:
    if not results:
        print("nothing was checked")
        return 1
    below = [r for r in results if r.theory < r.compiled]
    ratios = [r.theory / r.compiled for r in results]
    far = [r for r in results if r.theory - r.compiled > max((WORST - 1) * r.compiled, SLACK)]
    median = statistics.median(ratios)
    worst = max(results, key=lambda r: r.theory / r.compiled)
    print(
        f"{len(results)} of {wanted} plans: below the compiler {len(below)}, median over {median - 1:.2%}, "
        f"worst over {worst.theory / worst.compiled - 1:.1%} "
        f"({(worst.theory - worst.compiled) / 2**20:.1f} MiB), "
        f"beyond 10% and 16 MiB {len(far)}"
    )
    missed = [str(r.index) for r in (*below, *far)]
    if missed:
        print(f"missed: plans {', '.join(missed)}")
    return int(bool(missed) or median > MEDIAN or len(results) < wanted)


_HEAD = (
    f"{'plan':>4} {'target':<22}{'drafter':<13}{'dtype':<9}{'B':>3}{'S':>6}{'T':>4}{'C':>5}{'mesh':>5} "
    f"{'parts':<11}{'at':<5}{'theory MiB':>11}{'XLA MiB':>10}{'over':>8}{'MiB':>8}  largest"
)


def _line(case: Case, result: Result) -> str:
    over = result.theory - result.compiled
    parts = "/".join("all" if p is None else str(p) for p in case.parts)
    return (
        f"{case.index:>4} {case.target:<22}{case.drafter:<13}{case.dtype:<9}{case.batch:>3}{case.capacity:>6}"
        f"{case.nodes:>4}{case.chunk:>5}{case.shards:>5} {parts:<11}{'full' if case.full else '2':<5}"
        f"{result.theory / 2**20:>11.1f}{result.compiled / 2**20:>10.1f}{over / result.compiled:>8.2%}"
        f"{over / 2**20:>8.2f}  {result.largest}"
    )


def _read(path: Path | None, cases: dict[int, Case]) -> Iterator[tuple[int, Compiled]]:
    """What an earlier run had compiled of these very cases."""
    if path is None or not path.exists():
        return
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            index = int(row["index"])
            if index in cases and row["case"] == str(cases[index]):
                found = Compiled(index, int(row["generation"]), row["hungriest"], float(row["seconds"]))
                yield index, found


def _write(path: Path | None, case: Case, found: Compiled) -> None:
    if path is None:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(("index", "generation", "hungriest", "seconds", "case"))
        writer.writerow((*dataclasses.astuple(found), str(case)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=int, default=200)
    parser.add_argument("--full", type=int, default=30, help="plans compiled at their full depth")
    parser.add_argument("--every-program", action="store_true", help="greedy and small ones too")
    parser.add_argument("--platform", default="cpu", help="cpu, or cuda:SLUG for a described GPU")
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS, default=DRAFTERS, help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="results are appended, and taken up from there")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    if args.limit_seconds == float("inf"):
        args.limit_seconds = 10.0**7
    return args


if __name__ == "__main__":
    sys.exit(main())
