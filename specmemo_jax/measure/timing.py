"""Measuring on the live device what the planner's speed model needs: steps, prefill, drafting, rates.

Programs run back to back and are waited for once; every round times each of them, so that a slow moment
falls on all alike, and medians over the rounds are kept.
"""

import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specmemo_jax.decode.step import EngineState
from specmemo_jax.draft import Drafter, View
from specmemo_jax.draft.ngram import NgramState
from specmemo_jax.draft.protocol import State
from specmemo_jax.draft.tree import Tree
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.kv import Groups
from specmemo_jax.llama.packing import Target
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.planning.calibration import (
    Calibration,
    DraftPoint,
    Fingerprint,
    PrefillPoint,
    StepPoint,
)
from specmemo_jax.planning.speed import pass_cost

StepProgress = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What to time: every ``nodes`` at batch 1 and the first capacity; ``few_nodes`` at each other capacity
    and each other batch. ``repeats`` runs a round are timed together. ``probe_bytes`` and ``probe_size``
    are those of the arrays that bandwidth and rate are measured with: beyond any cache, and large enough
    to keep every unit busy.
    """

    nodes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    few_nodes: tuple[int, ...] = (1, 8)
    capacities: tuple[int, ...] = (256, 512, 2048)
    batches: tuple[int, ...] = (1, 4)
    rounds: int = 5
    repeats: int = 4
    probe_bytes: int = 2**28
    probe_size: int = 2048

    @property
    def steps(self) -> tuple[tuple[int, int, int], ...]:
        """``(batch, capacity, nodes)`` of every step to time."""
        base = self.capacities[0]
        every = [(1, base, nodes) for nodes in self.nodes]
        longer = [(1, capacity, nodes) for capacity in self.capacities[1:] for nodes in self.few_nodes]
        wider = [(batch, base, nodes) for batch in self.batches if batch > 1 for nodes in self.few_nodes]
        return tuple(dict.fromkeys((*every, *longer, *wider)))


@dataclasses.dataclass(frozen=True)
class BlankDrafter(Drafter):
    """A chain of zeros that costs nothing to draft: what is left of a step is verifying and committing."""

    num_nodes: int
    name: str = "blank"

    def limited(self, num_nodes: int) -> "BlankDrafter":
        """A shorter chain."""
        return BlankDrafter(num_nodes)

    def init(self, groups: Groups) -> State:
        """Nothing."""
        return ()

    def observe(
        self,
        view: View,
        state: State,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R C"],
        starts: Int[Array, " R"],
        counts: Int[Array, " R"],
    ) -> State:
        """Nothing."""
        return state

    def propose(
        self, view: View, state: State, pending: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> tuple[Tree, State]:
        """The pending token and zeros below it."""
        shape, line = (pending.shape[0], self.num_nodes), jnp.arange(self.num_nodes, dtype=jnp.int32)
        tokens = jnp.zeros(shape, jnp.int32).at[:, 0].set(pending)
        parents = jnp.broadcast_to(jnp.maximum(line - 1, 0), shape)
        return Tree(tokens, parents, jnp.broadcast_to(line, shape)), state


def measure(
    target: Target,
    drafter: Drafter | None,
    fingerprint: Fingerprint,
    grid: Grid,
    progress: StepProgress = lambda _: None,
) -> Calibration:
    """Time everything in ``grid`` for ``target`` and ``drafter`` on the device they lie on.

    The capacities beyond the model's context are left out; the cache of the largest is allocated once.
    """
    fitting = tuple(c for c in grid.capacities if c <= target.config.max_context) or grid.capacities[:1]
    grid = dataclasses.replace(grid, capacities=fitting)
    base = grid.capacities[0]
    blank = BlankDrafter(max(grid.nodes))
    engines = {batch: engine_at(target, blank, batch, base) for batch in sorted({1, *grid.batches})}
    states = {(b, c): part_filled(engines[b], c) for b, c in dict.fromkeys((b, c) for b, c, _ in grid.steps)}
    cases: dict[Any, Callable[[], float]] = {}
    for batch, capacity, nodes in grid.steps:
        progress(f"compiling a step of {batch} x {nodes} nodes over {capacity} slots")
        program = engines[batch].step_program(capacity, nodes=nodes)
        cases["step", batch, capacity, nodes] = step_case(
            engines[batch], program, states, (batch, capacity), grid.repeats
        )
    chunks = engines[1].plan.shapes.chunks
    for chunk in chunks:
        cases["prefill", chunk] = _prefill_case(engines[1], chunk)
    if drafter is not None:
        progress(f"compiling {drafter.name}")
        cases["draft"] = _draft_case(target, drafter, base, grid.repeats)
    cases["bandwidth"] = _bandwidth_case(grid.probe_bytes)
    cases["rate"] = _rate_case(target.dtype, grid.probe_size)
    for run in cases.values():
        run()
    seconds: dict[Any, list[float]] = {key: [] for key in cases}
    for number in range(grid.rounds):
        progress(f"round {number + 1} of {grid.rounds}")
        for key, run in cases.items():
            seconds[key].append(run())
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    for engine in engines.values():
        engine.close()
    return _calibration(target, drafter, fingerprint, grid, chunks, medians)


def _calibration(
    target: Target,
    drafter: Drafter | None,
    fingerprint: Fingerprint,
    grid: Grid,
    chunks: Sequence[int],
    seconds: dict[Any, float],
) -> Calibration:
    config, dtype, base = target.config, target.dtype.name, grid.capacities[0]
    bandwidth = grid.probe_bytes / seconds["bandwidth"]
    flops = 2 * grid.probe_size**3 / seconds["rate"]
    least = min(grid.nodes)
    work = pass_cost(config, dtype, 1, least, base, least)
    drafts: tuple[DraftPoint, ...] = ()
    if drafter is not None:
        drafted = drafter.work(config, target.dtype.itemsize, 1, base)
        drafts = (DraftPoint(drafter.name, drafter.num_nodes, base, drafted, seconds["draft"]),)
    return Calibration(
        fingerprint=fingerprint,
        date=datetime.date.today().isoformat(),
        num_layers=config.num_layers,
        bandwidth=bandwidth,
        flops=flops,
        smallest_roof_seconds=max(work.bytes / bandwidth, work.flops / flops),
        steps=tuple(StepPoint(b, n, c, seconds["step", b, c, n]) for b, c, n in grid.steps),
        prefills=tuple(PrefillPoint(c, base, seconds["prefill", c]) for c in sorted(chunks)),
        drafts=drafts,
    )


def engine_at(target: Target, drafter: Drafter | None, batch: int, capacity: int) -> Engine:
    """An engine whose prompts lie in a cache of ``capacity`` slots."""
    context = min(capacity, target.config.max_context)
    config, dtype = target.config, target.dtype.name
    shapes = Shapes(config, dtype, target.platform, context, batch, drafter, capacities=(capacity,))
    return Engine(target, lay_out(shapes))


def part_filled(engine: Engine, capacity: int) -> EngineState:
    """A device state to time steps with: ``capacity`` slots a row, three quarters of them full, with
    something to match for n-grams. The rows are done, so that they stay where they are.

    A done row takes as much work as a live one, but for this: it asks for the smallest of a drafter's
    verify buckets. So raises ConfigError for a drafter that has several.
    """
    if engine.drafter is not None and len(engine.drafter.verify_buckets) > 1:
        raise ConfigError(
            f"steps of {engine.drafter.name} cannot be timed alike: they verify "
            f"{' or '.join(map(str, engine.drafter.verify_buckets))} nodes as a match is worth; "
            "a drafter of one verify bucket would work"
        )
    return _part_filled(engine, capacity)


def _part_filled(engine: Engine, capacity: int) -> EngineState:
    state = engine.programs.empty_state(capacity)
    rows = dataclasses.replace(state.rows, lengths=jnp.full_like(state.rows.lengths, capacity * 3 // 4))
    draft = state.draft
    if isinstance(draft, NgramState):
        history = np.random.default_rng(0).integers(0, 50, draft.history.shape)
        draft = dataclasses.replace(draft, history=jnp.asarray(history, jnp.int32))
    return dataclasses.replace(state, rows=rows, draft=draft)


def step_case(
    engine: Engine, program: Any, states: dict[tuple[int, int], EngineState], key: Any, repeats: int
) -> Callable[[], float]:
    """Seconds a step; the state is donated and put back for the next."""

    def run() -> float:
        state = jax.block_until_ready(states[key])
        began = time.perf_counter()
        for _ in range(repeats):
            state, _ = program(engine.target.leaves, engine.draft_weights, state)
        jax.block_until_ready(state.emitted)
        states[key] = state
        return (time.perf_counter() - began) / repeats

    return run


def _prefill_case(engine: Engine, chunk: int) -> Callable[[], float]:
    """Seconds of a prompt of one chunk, its first token read."""

    def run() -> float:
        began = time.perf_counter()
        engine.admit(0, Request([0] * chunk, 1))
        return time.perf_counter() - began

    return run


def _draft_case(target: Target, drafter: Drafter, capacity: int, repeats: int) -> Callable[[], float]:
    """Seconds of one row's proposing and observing."""
    engine = engine_at(target, drafter, 1, capacity)
    state = _part_filled(engine, capacity)
    rows, weights, held = state.rows, engine.draft_weights, [state.draft]
    width = len(drafter.taps) * target.config.hidden_size

    def draft(leaves: Any, weights: Any, caches: Any, own: State) -> tuple[Any, State]:
        features = jnp.zeros((1, drafter.max_depth + 1, width), target.dtype) if width else None
        view = View(weights, target.merge(leaves), caches, features=features)
        tree, own = drafter.propose(view, own, rows.pending, rows.lengths)
        told = jnp.zeros((1, drafter.max_depth + 1), jnp.int32)
        one = jnp.ones((1,), jnp.int32)
        return tree, drafter.observe(view, own, jnp.zeros((1,), jnp.int32), told, rows.lengths, one)

    program = jax.jit(draft, donate_argnums=(3,))

    def run() -> float:
        own = jax.block_until_ready(held[0])
        began = time.perf_counter()
        for _ in range(repeats):
            tree, own = program(target.leaves, weights, state.caches, own)
        jax.block_until_ready(tree)
        held[0] = own
        return (time.perf_counter() - began) / repeats

    return run


def memory_speed(size: int = 2**28, rounds: int = 5) -> float:
    """Bytes a second at which the device reads an array of ``size`` bytes."""
    return size / _median(_bandwidth_case(size), rounds)


def product_rate(dtype: jnp.dtype, size: int = 2048, rounds: int = 5) -> float:
    """FLOPs a second of a square product with ``size`` rows in ``dtype``."""
    return 2 * size**3 / _median(_rate_case(dtype, size), rounds)


def _median(run: Callable[[], float], rounds: int) -> float:
    run()
    return statistics.median(run() for _ in range(rounds))


def _bandwidth_case(size: int) -> Callable[[], float]:
    """Seconds of reading ``size`` bytes, by a matrix-vector product."""
    columns = 1024
    matrix = jnp.ones((max(1, size // (4 * columns)), columns), jnp.float32)
    vector = jnp.ones((columns,), jnp.float32)
    return _timed(jax.jit(lambda m, v: m @ v), matrix, vector)


def _rate_case(dtype: jnp.dtype, size: int) -> Callable[[], float]:
    """Seconds of a square product in ``dtype``, float32 in full precision, summed in float32."""
    square = jnp.ones((size, size), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32))
    return _timed(product, square, square)


def _timed(function: Callable, *inputs: Any) -> Callable[[], float]:
    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        return time.perf_counter() - began

    return run
