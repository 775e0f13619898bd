"""Compiled programs: each is made when it is first asked for, or all of a plan's are made ahead."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jax
from tqdm import tqdm

from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.engine.programs import Programs

Kind = Literal["step", "recording step", "prefill", "catch up", "score", "move", "restore"]
Key = tuple[Kind, int, int, bool, int]  # kind, capacity, width, sampled, group
TOGETHER = 4  # programs compiled at once; each uses several processors, but not all the time


def plan_keys(programs: Programs) -> Iterator[tuple[str, Key]]:
    """Every program of the plan at its largest capacity, by name."""
    plan, S = programs.plan, programs.plan.capacities[-1]
    groups = [(0, "")]
    if len(plan.groups) > 1:
        groups = [(group, f" of {context}") for group, (_, context) in enumerate(plan.groups)]
    for sampled in (False, True):
        how = "sampled" if sampled else "greedy"
        for nodes in plan.tree_sizes:
            yield f"step {nodes}, {how}", ("step", S, nodes, sampled, 0)
        for width, (group, which) in itertools.product(plan.chunks, groups):
            yield f"prefill {width}{which}, {how}", ("prefill", S, width, sampled, group)
    if programs.drafter is not None:
        for width, (group, which) in itertools.product(plan.chunks, groups):
            yield f"catch up {width}{which}", ("catch up", S, width, False, group)
    for source, target in itertools.combinations(range(len(groups)), 2):
        yield f"move {source} to {target}", ("move", S, target, False, source)
    for width in plan.chunks if plan.scoring else ():
        yield f"score {width}", ("score", S, width, False, 0)
    yield "restore", ("restore", S, 0, False, 0)


class ProgramCache:
    """`Programs`, compiled. A program's key says what it was lowered for: its kind, the capacity, its width
    (tokens of a chunk, nodes of a step's tree, the other group of a move), whether it samples, and the group
    of the row.
    """

    def __init__(self, programs: Programs):
        self._programs = programs
        self._compiled: dict[Key, jax.stages.Compiled] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._compiled

    def get(
        self, kind: Kind, capacity: int, width: int = 0, sampled: bool = False, group: int = 0
    ) -> jax.stages.Compiled:
        """The program of a key."""
        key = (kind, capacity, width, sampled, group)
        if key not in self._compiled:
            self._compiled[key] = self._programs.compile(self.lowered(*key))
        return self._compiled[key]

    def fill(self) -> None:
        """Compile all of the plan's programs now, several at a time."""
        keys = [key for _, key in plan_keys(self._programs)]
        with ThreadPoolExecutor(TOGETHER) as pool:
            made = pool.map(lambda key: self.get(*key), keys)
            for _ in tqdm(made, "compiling", len(keys), leave=False, disable=None, unit="program"):
                pass

    def lowered(self, kind: Kind, capacity: int, width: int, sampled: bool, group: int) -> jax.stages.Lowered:
        """The program of a key, not compiled."""
        programs = self._programs
        match kind:
            case "prefill":
                return programs.prefill(capacity, width, sampled, group)
            case "catch up":
                return programs.catch_up(capacity, width, group)
            case "score":
                return programs.score(capacity, width)
            case "move":
                return programs.move(capacity, group, width)
            case "restore":
                return programs.restore(capacity)
            case "step" | "recording step":
                return programs.step(capacity, sampled, width, record=kind == "recording step")

    def most_extra_bytes(self, capacity: int) -> int:
        """What the hungriest of the programs so far at a capacity needs beside its arguments, says XLA."""
        programs = [program for (_, at, *_), program in self._compiled.items() if at == capacity]
        return max((compiled_memory(program).extra for program in programs), default=0)
