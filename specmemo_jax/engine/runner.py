"""The device's side of the engine: the state, the weights, and the compiled programs that advance it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from specmemo_jax.decode.step import EngineState
from specmemo_jax.engine.program_cache import Kind, ProgramCache
from specmemo_jax.engine.programs import Programs
from specmemo_jax.llama import kv
from specmemo_jax.llama.packing import Target
from specmemo_jax.memory.shapes import Shapes


class Runner:
    """Runs the programs of one plan over one donated `EngineState`, allocated when it is first needed.

    ``programs``: those that were compiled before; None compiles each when it is first asked for.
    """

    def __init__(
        self,
        target: Target,
        draft_weights: Any,
        shapes: Shapes,
        programs: ProgramCache | None = None,
    ):
        self.target, self.draft_weights, self.shapes = target, draft_weights, shapes
        self.lowering = Programs(target, shapes)
        self.programs = ProgramCache(self.lowering) if programs is None else programs
        self.state: EngineState | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether steps are queued to a device of its own."""
        return self.target.platform != "cpu"

    @property
    def capacity(self) -> int:
        """S: cache slots a row has at the moment, one of the widest group."""
        return 0 if self.state is None else kv.capacity_of(self.state.caches)

    def slots_of(self, row: int) -> int:
        """Cache slots of one row at the moment."""
        return self.shapes.groups_at(self.capacity).slots_of(row)

    def close(self) -> None:
        """Free the device state."""
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()
        self.state = None

    def program(
        self, kind: Kind, width: int = 0, sampled: bool = False, group: int = 0, capacity: int | None = None
    ) -> jax.stages.Compiled:
        """A program at the present capacity, or at another (`ProgramCache.get`)."""
        return self.programs.get(kind, self.capacity if capacity is None else capacity, width, sampled, group)

    def run(self, program: jax.stages.Compiled, *inputs: Any) -> Any:
        """Advance the state by a program; what else it gives is returned."""
        state, self.state = self.state, None  # donated: a call that fails has eaten it
        self.state, result = program(self.target.leaves, self.draft_weights, state, *inputs)
        return result

    def end(self, row: int) -> None:
        """The row emits nothing more."""
        if self.state is not None:
            self.run(self.program("end"), np.int32(row))

    def capacity_for(self, tokens: int) -> int:
        """Slots a row of so many tokens needs: the smallest planned capacity, and never less than now."""
        slots = max(min(tokens, self.shapes.context) + self.shapes.slack, self.shapes.chunks[0])
        return max(self.shapes.capacity_for(slots), self.capacity)

    def reserve(self, tokens: int) -> bool:
        """Make room for ``tokens`` a row; on CPU the cache grows through the plan's capacities. Whether the
        state was allocated just now, with no row in it.
        """
        capacity = self.capacity_for(tokens)
        if self.state is None:
            self.state = self.program("empty state", capacity=capacity)()
            return True
        if capacity > self.capacity:
            state, self.state = self.state, None
            self.state = grown(state, self.shapes, capacity)
        return False

    def committed(self, row: int, positions: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and values ``[K, positions, D]`` of a row's first positions, a layer each."""
        assert self.state is not None
        group, first = self.shapes.groups_at(self.capacity).place(row)

        def own(leaf: Any) -> np.ndarray:
            # Cut by NumPy: JAX would compile a cut for each length.
            return np.asarray(kv.plain(leaf))[row - first][:, :positions]

        return [(own(keys), own(values)) for keys, values in self.state.caches[group]]

    @property
    def live_generation_bytes(self) -> int:
        """Generation memory as it is: the state's arrays and the drafter's own weights, and what the compiler
        says that the hungriest program run so far at this capacity needs beside them.
        """
        shared = {id(leaf) for leaf in self.target.leaves}
        own = [leaf for leaf in jax.tree.leaves(self.draft_weights) if id(leaf) not in shared]
        arrays = [*jax.tree.leaves(self.state), *own]
        return sum(leaf.nbytes for leaf in arrays) + self.programs.most_extra_bytes(self.capacity)


def grown(state: EngineState, shapes: Shapes, capacity: int) -> EngineState:
    """The state with more slots a row: the drafter's part first, then the caches, layer by layer."""
    groups, drafter = shapes.groups_at(capacity), shapes.drafter
    draft = state.draft if drafter is None else drafter.grow(state.draft, groups)
    return dataclasses.replace(state, caches=kv.grow(state.caches, groups), draft=draft)
