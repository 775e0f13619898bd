"""The engine: owns the device state, runs the jitted programs, and hands out tokens in bursts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from specmemo_jax.compilation import compiler_options
from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.llama import kv
from specmemo_jax.llama.packing import Target
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.speculate.rows import Settings, init_rows
from specmemo_jax.speculate.sampling import Sampling, greedy_sampling
from specmemo_jax.speculate.step import EngineState, prefill_chunk, speculative_step


@dataclasses.dataclass
class RowLog:
    """What the host knows of a row: every id (so that the cache can be rebuilt), and its steps."""

    ids: list[int]
    num_prompt: int
    max_tokens: int
    stop_ids: tuple[int, ...]
    sampled: bool = False
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


@dataclasses.dataclass(frozen=True)
class Request:
    """What a row is admitted with; `specmemo_jax.serve` makes it of a prompt and SamplingParams.

    ``sampling``: the row's `Sampling` of host scalars and arrays, None for plain greedy decoding.
    """

    prompt: Sequence[int]
    max_tokens: int
    stop_ids: Sequence[int] = ()
    sampling: Sampling | None = None


class Engine:
    """B rows that decode together, each at its own length, inside one `MemoryPlan`.

    ``drafter=None`` is vanilla decoding on the same path. Rows are admitted into free
    slots at any time and never look at their neighbours. Programs are compiled when they
    are first needed, or ahead of time by `prepare`.
    """

    def __init__(self, target: Target, drafter: Drafter | None, plan: MemoryPlan):
        self.target, self.drafter, self.plan = target, drafter, plan
        self.draft_weights = () if drafter is None else drafter.weights(target)
        self.rows: list[RowLog | None] = [None] * plan.batch
        self._state: EngineState | None = None
        self._programs: dict[tuple[int, int, bool], jax.stages.Compiled] = {}
        greedy = greedy_sampling(1, plan.max_bad_words)
        self._greedy: Sampling = jax.tree.map(lambda leaf: np.asarray(leaf[0]), greedy)

    def close(self) -> None:
        """Free the device state; the engine allocates anew when used again."""
        if self._state is not None:
            for leaf in jax.tree.leaves(self._state):
                leaf.delete()
        self._state = None
        self.rows = [None] * self.plan.batch

    def take_state(self) -> EngineState:
        """Hand out the device state, for measurements; the engine starts anew without it."""
        state, self._state = self._state, None
        assert state is not None
        self.rows = [None] * self.plan.batch
        return state

    @property
    def capacity(self) -> int:
        """S: cache slots a row has at the moment."""
        return 0 if self._state is None else self._state.cache[0][0].shape[2]

    def empty_state(self, capacity: int) -> EngineState:
        """A new device state at ``capacity`` slots a row: no row in it, the cache zeroed."""
        plan, config = self.plan, self.target.config
        shape = (plan.batch, config.num_kv_heads, capacity, config.head_dim)
        return EngineState(
            cache=kv.init_cache(config.num_layers, shape, self.target.dtype),
            rows=init_rows(plan),
            draft=() if self.drafter is None else self.drafter.init(plan.batch, capacity),
        )

    def abstract_state(self, capacity: int) -> EngineState:
        """Shapes and dtypes of the device state at ``capacity`` slots, without allocating."""
        return jax.eval_shape(lambda: self.empty_state(capacity))

    def step_program(self, capacity: int, sampled: bool = False) -> jax.stages.Compiled:
        """The speculative step at ``capacity`` slots, compiled from shapes alone:
        ``f(leaves, draft_weights, state)``.
        """
        return self._program(capacity, 0, sampled, speculative_step)

    def prefill_program(self, capacity: int, width: int, sampled: bool = False) -> jax.stages.Compiled:
        """Prefill of ``width`` tokens at ``capacity`` slots, compiled from shapes alone."""
        inputs = self._prefill_inputs([0], width, 0, 0, Request([0], 1))
        return self._program(capacity, width, sampled, prefill_chunk, *jax.tree.map(jax.typeof, inputs))

    def _program(
        self, capacity: int, width: int, sampled: bool, step: Callable, *inputs: Any
    ) -> jax.stages.Compiled:
        key = (capacity, width, sampled)
        if key not in self._programs:
            function = functools.partial(step, self.target, self.drafter, sampled)
            jitted = jax.jit(function, donate_argnums=(2,))
            state = self.abstract_state(capacity)
            lowered = jitted.lower(self.target.leaves, self.draft_weights, state, *inputs)
            self._programs[key] = lowered.compile(compiler_options(self.target.platform))
        return self._programs[key]

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compile what these requests need first, and run it once, so that their clocks do not count it:
        prefill, and steps up to the cache's next growth. No row may be live.
        """
        longest = max(len(request.prompt) for request in requests)
        kinds = sorted({request.sampling is not None for request in requests})
        state, self._state = self._reserve(longest + 1), None
        capacity = state.cache[0][0].shape[2]
        widths = {
            (width, request.sampling is not None)
            for request in requests
            for _, width in chunk_starts(len(request.prompt), self.plan.chunks)
        }
        # Steps over empty rows, and prefill of row 0 as one that is done at once.
        for width, sampled in sorted({*((0, kind) for kind in kinds), *widths}):
            if (capacity, width, sampled) in self._programs:
                continue
            if width == 0:
                program, inputs = self.step_program(capacity, sampled), ()
            else:
                program = self.prefill_program(capacity, width, sampled)
                inputs = self._prefill_inputs([0], width, 0, 0, Request([0], 1))
            state, _ = program(self.target.leaves, self.draft_weights, state, *inputs)
        self._state = jax.block_until_ready(state)
        most = max(len(request.prompt) + request.max_tokens for request in requests)
        for sampled in kinds:
            self.step_program(min(self._capacity_for(most), 2 * capacity), sampled)

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
            draft = (
                self._state.draft if self.drafter is None else self.drafter.grow(self._state.draft, capacity)
            )
            cache = kv.grow(self._state.cache, capacity)
            self._state = dataclasses.replace(self._state, cache=cache, draft=draft)
        return self._state

    def admit(self, row: int, request: Request) -> int:
        """Prefill a request into a free row and return its first new token.

        The caller has checked that prompt and ``max_tokens`` together fit ``plan.context``.
        """
        ids = np.asarray(request.prompt, np.int32)
        sampled = request.sampling is not None
        state, first = self._reserve(len(ids)), None
        for start, width in chunk_starts(len(ids), self.plan.chunks):
            start = min(start, self.capacity - width)  # the last chunk may not hang over the end
            inputs = self._prefill_inputs(ids[start : start + width], width, start, row, request)
            program = self.prefill_program(self.capacity, width, sampled)
            self._state = None  # donated: a call that fails has eaten it
            state, first = program(self.target.leaves, self.draft_weights, state, *inputs)
            self._state = state
        assert first is not None
        ids = [*map(int, request.prompt), int(first)]
        log = RowLog(ids, len(request.prompt), request.max_tokens, tuple(request.stop_ids), sampled)
        self.rows[row] = log
        return log.ids[-1]

    def _prefill_inputs(
        self, ids: Sequence[int] | np.ndarray, width: int, start: int, row: int, request: Request
    ) -> tuple[Any, ...]:
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(ids)] = ids
        stops = np.full((self.plan.max_stop_ids,), -1, np.int32)
        stops[: len(request.stop_ids)] = request.stop_ids
        settings = Settings(np.int32(request.max_tokens), stops, request.sampling or self._greedy)
        return tokens, np.int32(start), np.int32(len(ids)), np.int32(row), settings

    def release(self, row: int) -> RowLog:
        """Take a row's log out and free its slot; a row that was not finished emits nothing more."""
        log = self.rows[row]
        assert log is not None
        self.rows[row] = None
        if not log.finished and self._state is not None:
            rows = self._state.rows
            rows = dataclasses.replace(rows, done=rows.done.at[row].set(True))
            self._state = dataclasses.replace(self._state, rows=rows)
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
        step = self.step_program(self.capacity, any(log.sampled for log in live))
        emitted = []
        self._state = None  # donated: a call that fails has eaten it
        for _ in range(steps):
            state, out = step(self.target.leaves, self.draft_weights, state)
            emitted.append((out.tokens, out.counts, out.live))
        self._state = state
        for result in jax.device_get(emitted):
            for log, tokens, count, took_part in zip(self.rows, *result, strict=True):
                if log is not None and took_part:
                    log.ids.extend(tokens[:count].tolist())
                    log.accepted_lengths.append(int(count))


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
