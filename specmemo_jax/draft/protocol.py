"""What the engine asks of a drafter. A new drafter is one file that implements this."""

from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Int

from specmemo_jax.memory.buffers import Buffer
from specmemo_jax.speculate.tree import Tree

State = Any  # a pytree of device arrays, the drafter's own


@runtime_checkable
class Drafter(Protocol):
    """Proposes a tree of ``num_nodes`` candidates a row, none deeper than ``max_depth``.

    All methods but `init` and `buffers` are pure and traced inside the engine's jitted
    programs. The engine owns the state and donates it.
    """

    @property
    def name(self) -> str:
        """How it is called in tables and messages."""
        ...

    @property
    def num_nodes(self) -> int:
        """T, root included."""
        ...

    @property
    def max_depth(self) -> int:
        """Levels below the root."""
        ...

    @property
    def is_chain(self) -> bool:
        """Every tree is one path in node order, so that accepted nodes need no gathering."""
        ...

    def init(self, batch: int, context: int) -> State:
        """Allocate the state for ``batch`` rows of at most ``context`` tokens."""
        ...

    def observe(
        self,
        state: State,
        tokens: Int[Array, "B C"],
        starts: Int[Array, " B"],
        counts: Int[Array, " B"],
    ) -> State:
        """Learn committed tokens: ``tokens[b, :counts[b]]`` stand at positions from ``starts[b]`` on.

        Chunks of any width; the tokens of a row come in order, and a position may be told again.
        """
        ...

    def propose(self, state: State, pending: Int[Array, " B"], lengths: Int[Array, " B"]) -> Tree:
        """A tree rooted in ``pending``, the token at position ``lengths[b]`` (after all observed ones)."""
        ...

    def truncate(self, state: State, lengths: Int[Array, " B"]) -> State:
        """Forget everything from position ``lengths[b]`` on."""
        ...

    def buffers(self, batch: int, context: int) -> tuple[Buffer, ...]:
        """Every device buffer that `init` allocates, for the memory model."""
        ...


def select_row(state: State, row: Int[Array, ""]) -> State:
    """One row of a state whose leaves all lead with the batch axis."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), state)


def update_row(state: State, new: State, row: Int[Array, ""]) -> State:
    """Put back what `select_row` took."""
    return jax.tree.map(
        lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part, row, 0), state, new
    )
