"""Compiled programs, each made when it is first asked for."""

from typing import Literal

import jax

from specmemo_jax.memory.compiled import compiled_memory
from specmemo_jax.speculate.programs import Programs

Kind = Literal["step", "recording step", "prefill", "catch up", "score", "move", "restore"]
Key = tuple[Kind, int, int, bool, int]  # kind, capacity, width, sampled, group


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
            self._compiled[key] = self._programs.compile(self._lowered(*key))
        return self._compiled[key]

    def _lowered(
        self, kind: Kind, capacity: int, width: int, sampled: bool, group: int
    ) -> jax.stages.Lowered:
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
