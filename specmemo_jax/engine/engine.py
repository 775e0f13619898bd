"""The engine: owns the device state, runs the jitted programs, and hands out tokens in bursts."""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from specmemo_jax.decode.emitted import drain
from specmemo_jax.decode.rows import Settings
from specmemo_jax.decode.sampling import Sampling, greedy_sampling
from specmemo_jax.decode.step import EngineState
from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.engine.adaptive import TreeChooser
from specmemo_jax.engine.program_cache import Kind, ProgramCache
from specmemo_jax.engine.programs import Programs
from specmemo_jax.engine.sequence import Request, RowLog, chunk_starts, common_prefix, history_of
from specmemo_jax.errors import CapacityError
from specmemo_jax.llama import kv
from specmemo_jax.llama.packing import Target
from specmemo_jax.memory.footprint import BURST
from specmemo_jax.memory.plan import MemoryPlan

# Steps of a program that are not timed: in them a GPU records its kernels as a graph, and XLA's CPU libraries
# prepare themselves (the first step of a tree of 4, batch 4, took 7 times the next).
CPU_SETTLING, GPU_SETTLING = 1, 4
SHORTEST_BURST = 0.02  # seconds: reading after every short step would cost more than a row's idle place


class Engine:
    """B rows that decode together, each at its own length, inside one `MemoryPlan`.

    ``drafter=None`` is vanilla decoding on the same path. ``adaptive``: move between the plan's
    trees as they pay, down to plain decoding. Rows are admitted into free
    slots at any time and never look at their neighbours. Programs are compiled when they
    are first needed, or ahead of time by `prepare`; ``compiled`` are those that were made before.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        plan: MemoryPlan,
        adaptive: bool = False,
        compiled: ProgramCache | None = None,
    ):
        self.target, self.adaptive = target, adaptive
        self.draft_weights = () if drafter is None else drafter.weights(target)
        self.prefilled_tokens = self.moved_rows = 0
        self._state: EngineState | None = None
        self.rows: list[RowLog | None] = []
        self.replan(drafter, plan)
        if compiled is not None:
            self._compiled = compiled
        greedy = greedy_sampling(1, plan.max_bad_words)
        self._greedy: Sampling = jax.tree.map(lambda leaf: np.asarray(leaf[0]), greedy)

    def replan(self, drafter: Drafter | None, plan: MemoryPlan) -> None:
        """Go on with other shapes and an empty device state; the drafter is the old one, limited, or None."""
        self.close()
        self.drafter, self.plan = drafter, plan
        if drafter is None:
            self.draft_weights = ()
        self.programs = Programs(self.target, drafter, plan)
        adapts = self.adaptive and len(plan.tree_sizes) > 1
        # A GPU's step takes less than reading what it said: whole bursts are compared there.
        probe = BURST if self._on_gpu else None
        self.chooser = TreeChooser(plan.tree_sizes, plan.batch, probe) if adapts else None
        self._compiled = ProgramCache(self.programs)
        self.rows = [None] * plan.batch
        self._held: list[RowLog | None] = [None] * plan.batch
        self._scored: list[int] = []  # what the last row's cache holds of `score`'s last ids
        self._step_seconds: dict[int, float] = {}  # of the last burst of each tree
        self._ran: Counter[jax.stages.Compiled] = Counter()  # steps of each program

    @property
    def _on_gpu(self) -> bool:
        return self.target.platform != "cpu"

    def close(self) -> None:
        """Free the device state; the engine allocates anew when used again."""
        if self._state is not None:
            for leaf in jax.tree.leaves(self._state):
                leaf.delete()
        self._forget()

    def take_state(self) -> EngineState:
        """Hand out the device state, for measurements; the engine starts anew without it."""
        state = self._state
        assert state is not None
        self._forget()
        return state

    def _forget(self) -> None:
        self._state = None
        self._scored = []
        self.rows = [None] * len(self.rows)
        self._held = [None] * len(self.rows)

    @property
    def capacity(self) -> int:
        """S: cache slots a row has at the moment, one of the widest group."""
        return 0 if self._state is None else kv.capacity_of(self._state.caches)

    def slots_of(self, row: int) -> int:
        """Cache slots of one row at the moment."""
        return self.plan.groups_at(self.capacity).slots_of(row)

    def committed(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and values ``[K, positions, D]`` of a live row's committed positions, a layer each."""
        log, state = self.rows[row], self._state
        assert log is not None
        assert state is not None
        group, first = self.plan.groups_at(self.capacity).place(row)

        def own(leaf: Any) -> np.ndarray:
            # Cut by NumPy: JAX would compile a cut for each length.
            return np.asarray(kv.dequantize(leaf))[row - first][:, : log.cached]

        return [(own(keys), own(values)) for keys, values in state.caches[group]]

    @property
    def live_generation_bytes(self) -> int:
        """Generation memory as it is: the state's arrays and the drafter's own weights, and what the compiler
        says that the hungriest program run so far at this capacity needs beside them.
        """
        arrays = jax.tree.leaves(self._state) + [
            leaf
            for leaf in jax.tree.leaves(self.draft_weights)
            if not any(leaf is shared for shared in self.target.leaves)
        ]
        return sum(leaf.nbytes for leaf in arrays) + self._compiled.most_extra_bytes(self.capacity)

    def step_program(
        self, capacity: int, sampled: bool = False, nodes: int | None = None, record: bool = False
    ) -> jax.stages.Compiled:
        """`Programs.step`, compiled: ``f(leaves, draft_weights, state)``."""
        nodes = self.plan.tree_nodes if nodes is None else nodes
        kind: Kind = "recording step" if record else "step"
        return self._compiled.get(kind, capacity, nodes, sampled)

    def prefill_program(
        self, capacity: int, width: int, sampled: bool = False, row: int = 0
    ) -> jax.stages.Compiled:
        """`Programs.prefill` for the group of ``row``, compiled."""
        return self._compiled.get("prefill", capacity, width, sampled, self._group(row))

    def _group(self, row: int) -> int:
        return self.plan.groups_at(0).place(row)[0]

    def _run(self, program: jax.stages.Compiled, *inputs: Any) -> Any:
        """Advance the state by a program; what else it gives is returned."""
        state, self._state = self._state, None  # donated: a call that fails has eaten it
        self._state, result = program(self.target.leaves, self.draft_weights, state, *inputs)
        return result

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compile what these requests need first, and run it once, so that their clocks do not count it:
        prefill, and steps up to the cache's next growth. No row may be live.
        """
        longest = max(len(request.prompt) for request in requests)
        rows = {self.row_for(request.prompt, set(range(self.plan.batch))) or 0 for request in requests}
        kinds = sorted({request.sampling is not None for request in requests})
        steps = max(request.max_tokens for request in requests)
        trees = self.chooser.ahead(steps) if self.chooser else (self.plan.tree_nodes,)
        self._reserve(longest + 1)
        capacity = self.capacity
        widths = {
            (width, request.sampling is not None)
            for request in requests
            for _, width in self._chunk_starts(len(request.prompt))
        }
        # Steps over empty rows, and prefill of a group's row as one that is done at once.
        wanted: set[tuple[Kind, int, bool, int]] = {
            *(("step", nodes, sampled, 0) for nodes in trees for sampled in kinds),
            *(("prefill", width, sampled, row) for width, sampled in widths for row in rows),
        }
        for kind, width, sampled, row in sorted(wanted):
            key = (kind, capacity, width, sampled, self._group(row))
            if key in self._compiled:
                continue
            if kind == "prefill" and any(self._held):
                continue  # running it would overwrite what a chat keeps in row 0
            inputs = () if kind == "step" else self._chunk_inputs([0], width, 0, row, Request([0], 1))
            self._run(self._compiled.get(*key), *inputs)
        jax.block_until_ready(self._state)
        most = max(len(request.prompt) + request.max_tokens for request in requests)
        for sampled in kinds:
            for nodes in trees:
                self.step_program(min(self._capacity_for(most), 2 * capacity), sampled, nodes)

    def _capacity_for(self, tokens: int) -> int:
        """Slots a row of so many tokens needs: the plan's next capacity, or what there is if that is more."""
        slots = max(min(tokens, self.plan.context) + self.plan.slack, self.plan.chunks[0])
        return max(self.plan.capacity_for(slots), self.capacity)

    def _reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` a row; on CPU the cache grows through the plan's capacities."""
        capacity = self._capacity_for(tokens)
        if self._state is None:
            self._held = [None] * self.plan.batch
            self._state = self.programs.empty_state(capacity)
        elif capacity > self.capacity:
            state, self._state = self._state, None
            groups = self.plan.groups_at(capacity)
            draft = state.draft if self.drafter is None else self.drafter.grow(state.draft, groups)
            caches = kv.grow(state.caches, groups)
            self._state = dataclasses.replace(state, caches=caches, draft=draft)

    def admit(self, row: int, request: Request) -> int:
        """Prefill a request into a free row and return its first new token.

        The caller has checked that prompt and ``max_tokens`` together fit ``plan.context``.
        """
        ids = list(map(int, request.prompt))
        self._reserve(len(ids))
        start = self._reuse(row, request) if request.reuse else 0
        first = self._prefill(row, ids, start, request)
        self.rows[row] = RowLog(request, [*ids, first], told=len(ids))
        return first

    def _prefill(self, row: int, ids: Sequence[int], begin: int, request: Request) -> int:
        """Read ``ids`` from ``begin`` on; the token that follows them."""
        first, sampled = None, request.sampling is not None
        self._scored = []
        self._held[row] = None
        for offset, width in self._chunk_starts(len(ids) - begin):
            # The last chunk may not hang over the end.
            start = min(begin + offset, self.slots_of(row) - width)
            inputs = self._chunk_inputs(ids[start : start + width], width, start, row, request)
            first = self._run(self.prefill_program(self.capacity, width, sampled, row), *inputs)
        assert first is not None
        self.prefilled_tokens += len(ids) - begin
        return int(first)

    def _reuse(self, row: int, request: Request) -> int:
        """Keep what the row's cache holds of the beginning of a prompt; how many tokens that is."""
        held, ids = self._held[row], request.prompt
        kept = 0 if held is None else common_prefix(held.ids[: held.cached], ids[:-1])
        if held is None or not kept:
            return 0
        self._restore(row, ids[:kept], (), int(ids[kept]), request, request.max_tokens)
        if self.drafter is not None:
            self._catch_up(row, ids, min(held.told, kept), kept)
        return kept

    def score(self, ids: Sequence[int], begin: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each token from position ``begin`` (1 at least) on, its natural log probability after those
        before it, and whether it is the likeliest there. What the last call read of the same beginning is not
        read again. No row may be live, and the ids fit the plan's context.

        Raises CapacityError where the plan has no room for scoring (`LLM`'s ``scoring``).
        """
        if not self.plan.scoring:
            raise CapacityError("the plan has no room for scoring; LLM(..., scoring=True) plans for it")
        self._reserve(len(ids))
        row, last = self.plan.batch - 1, len(ids) - 1  # the last id is predicted, and not read
        kept = min(common_prefix(self._scored, ids), begin - 1)
        self._scored, self._held[row] = [], None
        found, likeliest = np.zeros(len(ids)), np.zeros(len(ids), bool)
        for offset, width in self._chunk_starts(last - kept):
            start = min(kept + offset, self.slots_of(row) - width)
            end = min(start + width, last)
            drain, following = np.zeros((2, 1, width), np.int32)
            drain[0, : end - start], following[0, : end - start] = ids[start:end], ids[start + 1 : end + 1]
            program = self._compiled.get("score", self.capacity, width)
            scores = jax.device_get(self._run(program, drain, following, np.int32(start), np.int32(row)))
            for whole, part in zip((found, likeliest), scores, strict=True):
                whole[start + 1 : end + 1] = part[: end - start]
        self._scored = list(ids[:last])
        return found[begin:], likeliest[begin:]

    def rebuild(self, row: int, log: RowLog) -> None:
        """Put a row whose cache was lost back, from its ids; it goes on as if nothing had been."""
        self._reserve(len(log.ids))
        self._prefill(row, log.ids[:-1], 0, log.request)
        answer = log.new_ids
        self._restore(row, log.ids[: log.num_prompt], answer, log.ids[-1], log.request, log.left)
        log.told, log.waiting = log.cached, False
        self.rows[row] = log

    def _restore(
        self,
        row: int,
        prompt: Sequence[int],
        answer: Sequence[int],
        pending: int,
        request: Request,
        left: int,
    ) -> None:
        """Tell the device of a row: prompt and answer, of which the last token is pending if there is one."""
        V, recent = self.target.config.vocab_size, self.plan.max_bad_words[1] - 1
        length = len(prompt) + max(0, len(answer) - 1)
        settings = dataclasses.replace(self._settings(request), left=np.int32(left))
        inputs = (np.int32(row), np.int32(length), np.int32(pending), settings)
        self._run(
            self._compiled.get("restore", self.capacity), *inputs, *history_of(prompt, answer, V, recent)
        )

    def _catch_up(self, row: int, ids: Sequence[int], told: int, end: int) -> None:
        """Tell the drafter what a row committed while it slept: positions from ``told`` to ``end``."""
        for offset, width in self._chunk_starts(end - told):
            start = min(told + offset, self.slots_of(row) - width)
            inputs = _chunk(ids[start : min(start + width, end)], width, start, row)
            program = self._compiled.get("catch up", self.capacity, width, group=self._group(row))
            self._run(program, *inputs)

    def _chunk_starts(self, length: int) -> list[tuple[int, int]]:
        if self.plan.whole_prompts:
            return [(0, -(-length // 64) * 64)] if length else []
        return chunk_starts(length, self.plan.chunks)

    def _chunk_inputs(
        self, ids: Sequence[int], width: int, start: int, row: int, request: Request
    ) -> tuple[Any, ...]:
        return (*_chunk(ids, width, start, row), self._settings(request))

    def _settings(self, request: Request) -> Settings:
        stops = np.full((self.plan.max_stop_ids,), -1, np.int32)
        stops[: len(request.stop_ids)] = request.stop_ids
        return Settings(np.int32(request.max_tokens), stops, request.sampling or self._greedy)

    def release(self, row: int) -> RowLog:
        """Take a row's log out and free its slot; a row that was not finished emits nothing more."""
        log = self.rows[row]
        assert log is not None
        self.rows[row] = None
        self._held[row] = log
        if not log.finished:
            self._end(row)
        return log

    def row_for(self, ids: Sequence[int], free: Collection[int]) -> int | None:
        """The free row, of the narrowest group, that holds so many ids and a step; None where none does."""
        slots = self.plan.groups_at(self.plan.capacities[-1])
        needed = min(len(ids) + self.plan.slack, self.plan.context) + self.plan.slack
        return next((row for row in sorted(free) if slots.slots_of(row) >= needed), None)

    def make_room(self) -> Iterator[tuple[int, int]]:
        """Move live rows that have no room for a step into free rows of wider groups; ``(from, to)`` of each,
        when it has moved.

        A row that finds none waits, and is done on the device, until one is free; rows of the widest
        group never wait.
        """
        for row, log in enumerate(self.rows):
            if log is None or log.finished or self._steps_left(row, log):
                continue
            free = {other for other, held in enumerate(self.rows) if held is None}
            to = self.row_for(log.ids, free)
            if to is None:
                self._pause(row, log)
                continue
            self._reserve(len(log.ids))
            group, wide = self._group(row), self._group(to)
            program = self._compiled.get("move", self.capacity, wide, group=group)
            self._run(program, np.int32(row), np.int32(to))
            log.waiting = False
            self.moved_rows += 1
            self.rows[to], self.rows[row] = log, None
            self._held[to] = self._held[row] = None
            yield row, to

    def _steps_left(self, row: int, log: RowLog) -> int:
        """Steps of the largest tree for which a row's group has room."""
        if self._group(row) == len(self.plan.groups_at(0).sizes) - 1:
            return 2**31
        room = self.plan.groups_at(self.plan.capacities[-1]).slots_of(row) - self.plan.slack - len(log.ids)
        return max(0, room // self.plan.slack)

    def _pause(self, row: int, log: RowLog) -> None:
        if not log.waiting:
            log.waiting = True
            self._end(row)

    def _end(self, row: int) -> None:
        """A row emits nothing more."""
        if self._state is not None:
            rows = self._state.rows
            rows = dataclasses.replace(rows, done=rows.done.at[row].set(True))
            self._state = dataclasses.replace(self._state, rows=rows)

    def burst(self, max_steps: int = BURST, waiting: int = 0) -> None:
        """Run up to ``max_steps`` steps (`BURST` at most) without waiting in between, then read what they
        emitted.

        ``waiting``: requests that wait for a place. Where there are any, no more steps are run than the first
        row to end is thought to need, but for as many as take `SHORTEST_BURST` seconds. Rows in groups need
        `make_room` before it.
        """
        going = {row: log for row, log in enumerate(self.rows) if log is not None and log.going}
        live = list(going.values())
        if not live:
            return
        max_steps = min(max_steps, BURST, *(self._steps_left(row, log) for row, log in going.items()))
        nodes = self.plan.tree_nodes
        if self.chooser is not None:
            nodes, max_steps = self.chooser.choose(max_steps, waiting)
        deepest = self._max_depth(nodes) + 1
        steps = max(1, min(max_steps, -(-max(log.left for log in live) // deepest)))
        if waiting and (took := self._step_seconds.get(nodes)):
            first = min(log.steps_to_end(nodes) for log in live)
            steps = min(steps, max(first, math.ceil(SHORTEST_BURST / took)))
        self._reserve(max(len(log.ids) for log in live) + steps * deepest)
        step = self.step_program(self.capacity, any(log.sampled for log in live), nodes)
        for row, log in going.items():
            if nodes > 1:
                self._catch_up(row, log.ids, log.told, log.cached)
        began = time.perf_counter()
        for _ in range(steps):
            self._run(step)
        assert self._state is not None
        results = drain(self._state.emitted, steps)
        seconds = time.perf_counter() - began
        settled = self._ran[step] >= (GPU_SETTLING if self._on_gpu else CPU_SETTLING)
        self._ran[step] += steps
        self._step_seconds[nodes] = seconds / steps
        turns = tokens_of_all = 0  # a row's part in a step is a turn
        for result in results:
            for log, (count, *tokens) in zip(self.rows, result.tolist(), strict=True):
                if log is not None and count >= 0:
                    log.ids.extend(tokens[:count])
                    log.accepted_lengths.append(count)
                    log.tree_nodes.append(nodes)
                    log.told = log.cached if nodes > 1 else log.told
                    turns, tokens_of_all = turns + 1, tokens_of_all + count
        if self.chooser is not None and settled:
            self.chooser.record(nodes, steps, seconds, steps * tokens_of_all / max(turns, 1))

    def _max_depth(self, nodes: int) -> int:
        drafter = None if nodes == 1 else self.drafter
        return 0 if drafter is None else drafter.limited(nodes).max_depth


def _chunk(ids: Sequence[int], width: int, start: int, row: int) -> tuple[Any, ...]:
    """Inputs of a chunk of ``width`` tokens at position ``start`` of ``row``."""
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens, np.int32(start), np.int32(len(ids)), np.int32(row)
