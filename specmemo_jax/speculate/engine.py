"""The engine: owns the device state, runs the jitted programs, and hands out tokens in bursts."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.llama import kv
from specmemo_jax.llama.packing import Target
from specmemo_jax.memory.compiled import CompiledMemory, compiled_memory
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
        return self.ids[self.num_prompt :]

    @property
    def stopped(self) -> bool:
        """The last token is one of the row's stop ids."""
        return len(self.ids) > self.num_prompt and self.ids[-1] in self.stop_ids

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.new_ids) >= self.max_tokens


class Engine:
    """B rows that decode together, each at its own length, inside one `MemoryPlan`.

    ``drafter=None`` is vanilla decoding on the same path. Rows are admitted into free
    slots at any time and never look at their neighbours.
    """

    def __init__(self, target: Target, drafter: Drafter | None, plan: MemoryPlan):
        self.target, self.drafter, self.plan = target, drafter, plan
        self.rows: list[RowLog | None] = [None] * plan.batch
        self._prefill = jax.jit(functools.partial(prefill_chunk, target, drafter), donate_argnums=(1,))
        self._step = jax.jit(functools.partial(speculative_step, target, drafter), donate_argnums=(1,))
        self._state: EngineState | None = None

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

    def abstract_state(self, capacity: int) -> EngineState:
        """Shapes and dtypes of the device state at ``capacity`` slots, without allocating."""
        return jax.eval_shape(lambda: self._init_state(capacity))

    def _init_state(self, capacity: int) -> EngineState:
        plan, config = self.plan, self.target.config
        shape = (plan.batch, config.num_kv_heads, capacity, config.head_dim)
        draft = () if self.drafter is None else self.drafter.init(plan.batch, plan.capacities[-1])
        return EngineState(
            cache=kv.init_cache(config.num_layers, shape, self.target.dtype),
            rows=init_rows(plan.batch, plan.max_stop_ids),
            draft=draft,
        )

    def _reserve(self, slots: int) -> EngineState:
        """The state, with room for ``slots`` a row; on CPU the cache grows through the plan's capacities."""
        capacity = self.plan.capacity_for(slots)
        if self._state is None:
            self._state = self._init_state(capacity)
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
        first = None
        for start, width in chunk_starts(len(ids), self.plan.chunks):
            state = self._reserve(
                min(max(start + width, len(ids) + self.plan.slack), self.plan.capacities[-1])
            )
            start = min(start, len(ids) - 1, self.capacity - width)
            chunk = ids[start : start + width]
            count, padded = len(chunk), np.zeros((1, width), np.int32)
            padded[0, :count] = chunk
            self._state, first = self._prefill(
                self.target.leaves,
                state,
                padded,
                *(np.int32(x) for x in (start, count, row, max_tokens)),
                stops,
            )
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
        state = self._reserve(min(longest + steps * deepest, self.plan.context) + self.plan.slack)
        emitted = []
        for _ in range(steps):
            state, out = self._step(self.target.leaves, state)
            emitted.append((out.tokens, out.counts, out.live))
        self._state = state
        for step in jax.device_get(emitted):
            for log, tokens, count, took_part in zip(self.rows, *step, strict=True):
                if log is not None and took_part:
                    log.ids.extend(tokens[:count].tolist())
                    log.accepted_lengths.append(int(count))

    def step_memory(self, capacity: int) -> CompiledMemory:
        """XLA's figures for the speculative step at ``capacity`` slots, compiled from shapes alone."""
        return compiled_memory(self._step.lower(self.target.leaves, self.abstract_state(capacity)).compile())

    def prefill_memory(self, capacity: int, width: int) -> CompiledMemory:
        """XLA's figures for prefilling ``width`` tokens at ``capacity`` slots."""
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        tokens = jax.ShapeDtypeStruct((1, width), jnp.int32)
        stops = jax.ShapeDtypeStruct((self.plan.max_stop_ids,), jnp.int32)
        args = (tokens, scalar, scalar, scalar, scalar, stops)
        return compiled_memory(
            self._prefill.lower(self.target.leaves, self.abstract_state(capacity), *args).compile()
        )


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
