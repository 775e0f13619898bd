"""The engine: rows that decode together, in bursts of steps, inside one plan."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from specmemo_jax.decode.emitted import BURST, drain
from specmemo_jax.decode.step import EngineState
from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.engine.adaptive import TreeChooser
from specmemo_jax.engine.placement import Placement
from specmemo_jax.engine.program_cache import Key, Kind, ProgramCache
from specmemo_jax.engine.programs import Programs
from specmemo_jax.engine.reading import chunk_of, chunk_starts, observe, prefill, restore, settings_of
from specmemo_jax.engine.request import Request, common_prefix
from specmemo_jax.engine.runner import Runner
from specmemo_jax.engine.scoring import Scorer
from specmemo_jax.errors import CapacityError, DrafterWarning
from specmemo_jax.llama.packing import Target
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.memory.shapes import Shapes

# Steps of a program that are not timed: in them a GPU records its kernels as a graph, and XLA's CPU libraries
# prepare themselves (the first step of a tree of 4, batch 4, took 7 times the next).
CPU_SETTLING, GPU_SETTLING = 1, 4
# A trained head that brings fewer tokens a step than so, over so many, is not one for this target.
UNTRAINED_LENGTH, JUDGED_STEPS = 1.02, 256
SHORTEST_BURST = 0.02  # seconds: reading after every short step would cost more than a row's idle place


class Engine:
    """B rows that decode together, each at its own length, inside one `MemoryPlan`.

    ``drafter=None`` is plain decoding on the same path. ``adaptive``: move between the plan's trees as they
    pay, down to plain decoding. Requests are admitted into free rows at any time and never look at their
    neighbours. Programs are compiled when they are first needed, or ahead of time by `prepare`; ``compiled``
    are those that were made before.

    It owns a `Runner` (the device's side), a `Placement` (which request lies in which row) and a `Scorer`.
    """

    def __init__(
        self,
        target: Target,
        plan: MemoryPlan,
        adaptive: bool = False,
        compiled: ProgramCache | None = None,
    ):
        self.target, self.adaptive = target, adaptive
        drafter = plan.drafter
        self.draft_weights = () if drafter is None else drafter.weights(target)
        self.prefilled_tokens = self.moved_rows = 0
        self._set_up(plan, compiled)

    def _set_up(self, plan: MemoryPlan, compiled: ProgramCache | None = None) -> None:
        self.plan = plan
        self.runner = Runner(self.target, self.draft_weights, self.shapes, compiled)
        self.placement, self.scorer = Placement(self.shapes), Scorer(self.runner)
        adapts = self.adaptive and len(self.shapes.tree_sizes) > 1
        # A GPU's step takes less than reading what it said: whole bursts are compared there.
        probe = BURST if self.runner.on_gpu else None
        self.chooser = TreeChooser(self.shapes.tree_sizes, self.shapes.batch, probe) if adapts else None
        self._step_seconds: dict[int, float] = {}  # of the last burst of each tree
        self._steps_run: Counter[jax.stages.Compiled] = Counter()
        self._judged: list[int] | None = []  # tokens of a trained head's first steps, until it was judged
        self._waiting = 0  # plain steps that a drafter with taps has not read

    def replan(self, plan: MemoryPlan) -> None:
        """Go on with other shapes and an empty device state; their drafter: the old one, limited, or None."""
        self.close()
        self.runner.programs.close()
        if plan.drafter is None:
            self.draft_weights = ()
        self._set_up(plan)

    @property
    def shapes(self) -> Shapes:
        """The plan's."""
        return self.plan.shapes

    @property
    def drafter(self) -> Drafter | None:
        """None for plain decoding."""
        return self.shapes.drafter

    @property
    def rows(self) -> list[Request | None]:
        """The request in each row, None where it is free."""
        return self.placement.rows

    @property
    def programs(self) -> Programs:
        """What is lowered."""
        return self.runner.lowering

    @property
    def capacity(self) -> int:
        """S: cache slots a row has at the moment, one of the widest group."""
        return self.runner.capacity

    @property
    def live_generation_bytes(self) -> int:
        """Generation memory as it is (`Runner.live_generation_bytes`)."""
        return self.runner.live_generation_bytes

    def close(self) -> None:
        """Free the device state; the engine allocates anew when used again."""
        self.runner.close()
        self._forget()

    def take_state(self) -> EngineState:
        """Hand out the device state, for measurements; the engine starts anew without it."""
        state, self.runner.state = self.runner.state, None
        assert state is not None
        self._forget()
        return state

    def _forget(self) -> None:
        self.placement = Placement(self.shapes)
        self.scorer.forget()

    def _reserve(self, tokens: int) -> None:
        if self.runner.reserve(tokens):
            self.placement.kept = [None] * self.shapes.batch

    def committed(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and values ``[K, positions, D]`` of a live row's committed positions, a layer each."""
        request = self.rows[row]
        assert request is not None
        return self.runner.committed(row, request.num_cached)

    def step_program(
        self, capacity: int, sampled: bool = False, nodes: int | None = None, record: bool = False
    ) -> jax.stages.Compiled:
        """`Programs.step`, compiled: ``f(leaves, draft_weights, state)``."""
        nodes = self.shapes.tree_nodes if nodes is None else nodes
        return self.runner.program("recording step" if record else "step", nodes, sampled, 0, capacity)

    def prefill_program(
        self, capacity: int, width: int, sampled: bool = False, row: int = 0
    ) -> jax.stages.Compiled:
        """`Programs.prefill` for the group of ``row``, compiled."""
        return self.runner.program("prefill", width, sampled, self.placement.group_of(row), capacity)

    # ------------------------------------------------------------ requests in and out

    def admit(self, row: int, request: Request) -> int:
        """Read a request into a free row: its prompt, whose next token is then its first; or, where it had
        begun and its cache was lost, all of it, so that it goes on as if nothing had been. The pending token.

        The caller has checked that prompt and ``max_tokens`` together fit ``plan.context``.
        """
        request.admitted_at = request.admitted_at or time.perf_counter()
        ids = request.ids[:-1] if request.begun else list(request.ids)
        self._reserve(len(ids) + request.begun)
        kept = 0 if request.begun or not request.reuse else self._kept_prefix(row, request)
        self.scorer.forget()
        self.placement.kept[row] = None
        first = prefill(self.runner, row, request, ids, kept)
        request.num_prefilled = len(ids) - kept
        self.prefilled_tokens += request.num_prefilled
        if request.begun:
            restore(self.runner, row, request)
        else:
            request.ids.append(first)
            request.answered_at = time.perf_counter()
        request.num_observed, request.paused = len(ids), False
        self.placement.put(row, request)
        return request.ids[-1]

    def _kept_prefix(self, row: int, request: Request) -> int:
        """Keep what the row's cache holds of the beginning of a prompt; how many tokens that is."""
        before = self.placement.kept[row]
        if before is None:
            return 0
        kept = common_prefix(before.ids[: before.num_cached], request.ids[:-1])
        if self.drafter is not None and self.drafter.most_waiting:  # for the token after the last one kept
            kept = max(0, kept - 1)
        if kept:
            restore(self.runner, row, request, kept)
            if self.drafter is not None and not self.drafter.taps:
                observe(self.runner, row, request.ids, min(before.num_observed, kept), kept)
        return kept

    def release(self, row: int) -> Request:
        """Take a request out and free its row; one that was not finished emits nothing more."""
        request = self.placement.take(row)
        if not request.finished:
            self.runner.end(row)
        return request

    def migrate_rows(self) -> Iterator[tuple[int, int]]:
        """Move requests that have no room for a step into free rows of wider groups; ``(from, to)`` of each,
        when it has moved.

        One that finds none is paused, and done on the device, until a row is free; those of the widest group
        never are.
        """
        for row, to in self.placement.outgrown():
            request = self.rows[row]
            assert request is not None
            if to is None:
                if not request.paused:
                    request.paused = True
                    self.runner.end(row)
                continue
            self._reserve(len(request.ids))
            source, target = self.placement.group_of(row), self.placement.group_of(to)
            self.runner.run(self.runner.program("move", target, group=source), np.int32(row), np.int32(to))
            self.placement.move(row, to)
            self.moved_rows += 1
            yield row, to

    def score(self, ids: Sequence[int], begin: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each token from position ``begin`` (1 at least) on, its natural log probability after those
        before it, and whether it is the likeliest there. What the last call read of the same beginning is not
        read again. No row may be live, and the ids fit the plan's context.

        Raises CapacityError where the plan has no room for scoring (`LLM`'s ``scoring``).
        """
        if not self.shapes.scoring:
            raise CapacityError("the plan has no room for scoring; LLM(..., scoring=True) plans for it")
        self._reserve(len(ids))
        self.placement.kept[-1] = None
        return self.scorer.score(ids, begin)

    # ------------------------------------------------------------ steps

    def burst(self, max_steps: int = BURST, waiting: int = 0) -> None:
        """Run up to ``max_steps`` steps (`BURST` at most) without a pause, then read what they emitted.

        ``waiting``: requests that wait for a row. Where there are any, no more steps are run than the first
        request to end is thought to need, but for as many as take `SHORTEST_BURST` seconds. Rows in groups
        need `migrate_rows` before it.
        """
        live = self.placement.live
        if not live:
            return
        nodes, steps = self._choose(live, min(max_steps, BURST), waiting)
        self._reserve(max(len(s.ids) for s in live.values()) + steps * self._path_length(nodes))
        self._observe_what_was_missed(nodes, steps)
        step = self.step_program(self.capacity, any(s.sampled for s in live.values()), nodes)
        began = time.perf_counter()
        for _ in range(steps):
            self.runner.run(step)
        assert self.runner.state is not None
        emitted = drain(self.runner.state.emitted, steps)
        seconds, turns = time.perf_counter() - began, []
        for of_step in emitted.tolist():
            for request, (count, *tokens) in zip(self.rows, of_step, strict=True):
                if request is not None and count >= 0:  # it took part
                    request.append(tokens[:count], nodes)
                    turns.append(count)
        self._record(step, nodes, steps, seconds, turns)

    def _choose(self, live: dict[int, Request], most: int, waiting: int) -> tuple[int, int]:
        """The next burst's tree, and its steps."""
        nodes, steps = self.shapes.tree_nodes, min(most, *map(self.placement.steps_left, live))
        if self.chooser is not None:
            nodes, steps = self.chooser.choose(steps, waiting)
        if nodes == 1 and self.drafter is not None and self.drafter.most_waiting:
            steps = min(steps, self.drafter.most_waiting)
        longest = max(request.left for request in live.values())
        steps = max(1, min(steps, -(-longest // self._path_length(nodes))))
        if waiting and (seconds := self._step_seconds.get(nodes)):
            first = min(request.steps_to_end(nodes) for request in live.values())
            steps = min(steps, max(first, math.ceil(SHORTEST_BURST / seconds)))
        return nodes, steps

    def _path_length(self, nodes: int) -> int:
        """The most tokens that a step with such a tree emits a row."""
        return 1 if nodes == 1 or self.drafter is None else self.drafter.limited(nodes).max_depth + 1

    def _observe_what_was_missed(self, nodes: int, steps: int) -> None:
        """Before ``steps`` steps of trees of ``nodes``, tell the drafter what rows committed while it slept:
        every row, since it drafts for all of them. One with taps has seen it, and reads what waits.
        """
        if self.drafter is None:
            return
        if self.drafter.taps:
            most = self.drafter.most_waiting
            plain = steps if nodes == 1 and most else 0
            if self._waiting and (nodes > 1 or self._waiting + plain > most):
                self.runner.run(self.runner.program("settle"))
                self._waiting = 0
            self._waiting += plain
            return
        if nodes == 1:
            return
        for row, request in self.placement.cached.items():
            if request.num_observed < request.num_cached:
                observe(self.runner, row, request.ids, request.num_observed, request.num_cached)
                request.num_observed = request.num_cached

    def _record(
        self, step: jax.stages.Compiled, nodes: int, steps: int, seconds: float, turns: list[int]
    ) -> None:
        """Let the chooser know what a burst cost and gave; ``turns``: tokens of each row's part in a step."""
        settled = self._steps_run[step] >= (GPU_SETTLING if self.runner.on_gpu else CPU_SETTLING)
        self._steps_run[step] += steps
        self._step_seconds[nodes] = seconds / steps
        if self.chooser is not None and settled:
            self.chooser.record(nodes, steps, seconds, steps * sum(turns) / max(len(turns), 1))
        if nodes > 1 and self._judged is not None and self.drafter is not None and self.drafter.taps:
            self._judge_head(turns)

    def _judge_head(self, turns: list[int]) -> None:
        """Say once if a trained head is never right: with another target's shapes nothing else would tell."""
        assert self._judged is not None
        assert self.drafter is not None
        self._judged += turns
        if len(self._judged) < JUDGED_STEPS:
            return
        length, self._judged = sum(self._judged) / len(self._judged), None
        if length < UNTRAINED_LENGTH:
            warnings.warn(
                f"drafter {self.drafter.name}: {length:.2f} tokens a step over {JUDGED_STEPS} steps, so next "
                "to nothing that it guesses is right; a head that was trained for this target would work",
                DrafterWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------ compiled ahead

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compile what these requests need first, and run it once, so that their clocks do not count it:
        prefill, and steps up to the cache's next growth. No row may be live.
        """
        rows = {self.placement.row_for(s.num_prompt) or 0 for s in requests}
        kinds = sorted({s.sampled for s in requests})
        steps = max(s.max_tokens for s in requests)
        trees = self.chooser.ahead(steps) if self.chooser else (self.shapes.tree_nodes,)
        self._reserve(max(s.num_prompt for s in requests) + 1)
        widths = {
            (width, s.sampled) for s in requests for _, width in chunk_starts(self.shapes, s.num_prompt)
        }
        # Steps over empty rows, and prefill of a group's row as one that is done at once.
        wanted: set[tuple[Kind, int, bool, int]] = {
            *(("step", nodes, sampled, 0) for nodes in trees for sampled in kinds),
            *(("prefill", width, sampled, row) for width, sampled in widths for row in rows),
        }
        programs, capacity = self.runner.programs, self.capacity
        most = max(s.num_prompt + s.max_tokens for s in requests)
        later = min(self.runner.capacity_for(most), 2 * capacity)
        now: dict[Key, int] = {
            (kind, capacity, width, sampled, self.placement.group_of(row)): row
            for kind, width, sampled, row in sorted(wanted)
        }
        new = {key: row for key, row in now.items() if key not in programs}
        ahead: list[Key] = [("step", later, nodes, sampled, 0) for sampled in kinds for nodes in trees]
        if self.drafter is not None and self.drafter.most_waiting and 1 in trees:
            ahead.append(("settle", capacity, 0, False, 0))
        programs.get_all([*new, *ahead])
        nothing = settings_of(Request([0], 1))
        for key, row in new.items():
            if key[0] == "step":
                self.runner.run(programs.get(*key))
            elif not any(self.placement.kept):  # or it would overwrite what a chat keeps
                self.runner.run(programs.get(*key), *chunk_of([0], key[2], 0, row), nothing)
        jax.block_until_ready(self.runner.state)
