"""The engine: owns the device state, runs the jitted programs, and hands out tokens in bursts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specmemo_jax.compilation import compiler_options
from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.llama import kv
from specmemo_jax.llama.packing import Target
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.speculate.step import EngineState, init_rows, prefill_chunk, speculative_step


@dataclasses.dataclass
class RowLog:
    """What the host knows of a row: every id (so that the cache can be rebuilt), and its steps."""

    ids: list[int]
    num_prompt: int
    max_tokens: int
    stop_ids: tuple[int, ...]
    accepted_lengths: list[int] = dataclasses.field(default_factory=list)

    @property
    def new_ids(self) -> list[int]:
        """What was generated so far."""
        return self.ids[self.num_prompt :]

    @property
    def stopped(self) -> bool:
        """The last token is one of the row's stop ids."""
        return len(self.ids) > self.num_prompt and self.ids[-1] in self.stop_ids

    @property
    def finished(self) -> bool:
        """A stop id ended it, or its budget is spent."""
        return self.stopped or len(self.new_ids) >= self.max_tokens


class Engine:
    """B rows that decode together, each at its own length, inside one `MemoryPlan`.

    ``drafter=None`` is vanilla decoding on the same path. Rows are admitted into free
    slots at any time and never look at their neighbours. Programs are compiled when they
    are first needed, or ahead of time by `prepare`.
    """

    def __init__(self, target: Target, drafter: Drafter | None, plan: MemoryPlan):
        self.target, self.drafter, self.plan = target, drafter, plan
        self.rows: list[RowLog | None] = [None] * plan.batch
        self._state: EngineState | None = None
        self._programs: dict[tuple[int, int], jax.stages.Compiled] = {}

    def close(self) -> None:
        """Free the device state; the engine allocates anew when used again."""
        if self._state is not None:
            for leaf in jax.tree.leaves(self._state):
                leaf.delete()
        self._state = None
        self.rows = [None] * self.plan.batch

    @property
    def capacity(self) -> int:
        """S: cache slots a row has at the moment."""
        return 0 if self._state is None else self._state.cache[0][0].shape[2]

    def empty_state(self, capacity: int) -> EngineState:
        """A new device state at ``capacity`` slots a row: no row in it, the cache zeroed."""
        plan, config = self.plan, self.target.config
        shape = (plan.batch, config.num_kv_heads, capacity, config.head_dim)
        draft = () if self.drafter is None else self.drafter.init(plan.batch, plan.capacities[-1])
        return EngineState(
            cache=kv.init_cache(config.num_layers, shape, self.target.dtype),
            rows=init_rows(plan.batch, plan.max_stop_ids),
            draft=draft,
        )

    def abstract_state(self, capacity: int) -> EngineState:
        """Shapes and dtypes of the device state at ``capacity`` slots, without allocating."""
        return jax.eval_shape(lambda: self.empty_state(capacity))

    def step_program(self, capacity: int) -> jax.stages.Compiled:
        """The speculative step at ``capacity`` slots, compiled from shapes alone: ``f(leaves, state)``."""
        return self._program(capacity, 0, speculative_step)

    def prefill_program(self, capacity: int, width: int) -> jax.stages.Compiled:
        """Prefill of ``width`` tokens at ``capacity`` slots, compiled from shapes alone."""
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        tokens = jax.ShapeDtypeStruct((1, width), jnp.int32)
        stops = jax.ShapeDtypeStruct((self.plan.max_stop_ids,), jnp.int32)
        return self._program(capacity, width, prefill_chunk, tokens, scalar, scalar, scalar, scalar, stops)

    def _program(self, capacity: int, width: int, step: Callable, *inputs: Any) -> jax.stages.Compiled:
        if (capacity, width) not in self._programs:
            jitted = jax.jit(functools.partial(step, self.target, self.drafter), donate_argnums=(1,))
            lowered = jitted.lower(self.target.leaves, self.abstract_state(capacity), *inputs)
            self._programs[capacity, width] = lowered.compile(compiler_options(self.target.platform))
        return self._programs[capacity, width]

    def prepare(self, prompts: Sequence[int], max_tokens: int) -> None:
        """Compile what requests of these prompt lengths need first, and run it once, so that their clocks
        do not count it: prefill, and steps up to the cache's next growth. No row may be live.
        """
        longest = max(prompts)
        state, self._state = self._reserve(longest + 1), None
        capacity = state.cache[0][0].shape[2]
        widths = {width for length in prompts for _, width in chunk_starts(length, self.plan.chunks)}
        for width in sorted({0, *widths}):  # over empty rows, and over row 0 as one that is done at once
            if (capacity, width) in self._programs:
                continue
            if width == 0:
                state, _ = self.step_program(capacity)(self.target.leaves, state)
            else:
                inputs = _prefill_inputs([0], width, 0, 0, 1, np.full((self.plan.max_stop_ids,), -1))
                state, _ = self.prefill_program(capacity, width)(self.target.leaves, state, *inputs)
        self._state = jax.block_until_ready(state)
        self.step_program(min(self._capacity_for(longest + max_tokens), 2 * capacity))

    def _capacity_for(self, tokens: int) -> int:
        """Slots a row of so many tokens needs: the plan's next capacity, or what there is if that is more."""
        slots = max(min(tokens, self.plan.context) + self.plan.slack, self.plan.chunks[0])
        return max(self.plan.capacity_for(slots), self.capacity)

    def _reserve(self, tokens: int) -> EngineState:
        """The state, with room for ``tokens`` a row; on CPU the cache grows through the plan's capacities."""
        capacity = self._capacity_for(tokens)
        if self._state is None:
            self._state = self.empty_state(capacity)
        elif capacity > self.capacity:
            self._state = dataclasses.replace(self._state, cache=kv.grow(self._state.cache, capacity))
        return self._state

    def admit(self, row: int, prompt: Sequence[int], max_tokens: int, stop_ids: Sequence[int] = ()) -> int:
        """Prefill ``prompt`` into a free row and return the first new token.

        The caller has checked that ``prompt`` plus ``max_tokens`` fit ``plan.context``.
        """
        ids = np.asarray(prompt, np.int32)
        stops = np.full((self.plan.max_stop_ids,), -1, np.int32)
        stops[: len(stop_ids)] = stop_ids
        state, first = self._reserve(len(ids)), None
        for start, width in chunk_starts(len(ids), self.plan.chunks):
            start = min(start, self.capacity - width)  # the last chunk may not hang over the end
            inputs = _prefill_inputs(ids[start : start + width], width, start, row, max_tokens, stops)
            program = self.prefill_program(self.capacity, width)
            self._state = None  # donated: a call that fails has eaten it
            state, first = program(self.target.leaves, state, *inputs)
            self._state = state
        assert first is not None
        log = RowLog([*map(int, prompt), int(first)], len(ids), max_tokens, tuple(stop_ids))
        self.rows[row] = log
        return log.ids[-1]

    def release(self, row: int) -> RowLog:
        """Take a finished row's log out and free its slot."""
        log = self.rows[row]
        assert log is not None
        self.rows[row] = None
        return log

    def burst(self, max_steps: int = 8) -> None:
        """Run up to ``max_steps`` steps without waiting in between, then read what they emitted."""
        live = [log for log in self.rows if log is not None and not log.finished]
        if not live:
            return
        deepest = self.plan.max_depth + 1
        left = max(log.max_tokens - len(log.new_ids) for log in live)
        steps = max(1, min(max_steps, -(-left // deepest)))
        longest = max(len(log.ids) for log in live)
        state = self._reserve(longest + steps * deepest)
        step = self.step_program(self.capacity)
        emitted = []
        self._state = None  # donated: a call that fails has eaten it
        for _ in range(steps):
            state, out = step(self.target.leaves, state)
            emitted.append((out.tokens, out.counts, out.live))
        self._state = state
        for result in jax.device_get(emitted):
            for log, tokens, count, took_part in zip(self.rows, *result, strict=True):
                if log is not None and took_part:
                    log.ids.extend(tokens[:count].tolist())
                    log.accepted_lengths.append(int(count))


def _prefill_inputs(
    ids: Sequence[int] | np.ndarray, width: int, start: int, row: int, max_tokens: int, stop_ids: np.ndarray
) -> tuple[np.ndarray | np.int32, ...]:
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    scalars = (np.int32(value) for value in (start, len(ids), row, max_tokens))
    return tokens, *scalars, stop_ids.astype(np.int32)


def chunk_starts(length: int, chunks: Sequence[int]) -> list[tuple[int, int]]:
    """``(start, width)`` of the chunks that cover a prompt: large ones first, the rest in small ones.

    Three or more small chunks are worth one large one.
    """
    large, small = chunks[0], chunks[-1]
    plan, start = [], 0
    while start < length:
        rest = length - start
        width = large if rest > 3 * small or large == small else small
        plan.append((start, width))
        start += width
    return plan
