"""What the memory model knows of a device buffer, and of a drafter."""

import dataclasses
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Groups

if TYPE_CHECKING:
    from specmemo_jax.memory.activations import Pass


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A device buffer by name: its shape, dtype and bytes, before it exists."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def cache_buffer(
    name: str, groups: Groups, vector: tuple[int, int, int, int], dtype: str, itemsize: int
) -> Buffer:
    """Keys and values of rows in ``groups``; ``vector``: layers, 2, K, and D numbers (or 1, of scales)."""
    layers, two, heads, length = vector
    bytes_ = layers * two * heads * length * itemsize * groups.total
    if len(groups.sizes) == 1:
        return Buffer(name, (layers, two, groups.rows, heads, groups.most, length), dtype, bytes_)
    return Buffer(name, (layers, two, heads, groups.total, length), dtype, bytes_)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step's drafting costs a device: passes of a model with ``layers`` in all, floating-point
    operations, and bytes read.
    """

    layers: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@runtime_checkable
class DraftCost(Protocol):
    """The part of a drafter that a plan prices: its tree's size and its own buffers."""

    @property
    def num_nodes(self) -> int:
        """T, root included."""
        ...

    @property
    def max_depth(self) -> int:
        """Levels below the root."""
        ...

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of nodes that verification is compiled for, rising to ``num_nodes``."""
        ...

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def rungs(self) -> tuple[int, ...]:
        """Sizes of tree to move between, rising to ``num_nodes``."""
        ...

    def limited(self, num_nodes: int) -> "DraftCost":
        """The same on the same state, with the trees of another of its `rungs`."""
        ...

    def work(self, config: LlamaConfig, itemsize: int, batch: int, length: int) -> Work:
        """What drafting costs a step."""
        ...

    def buffers(self, groups: Groups) -> tuple[Buffer, ...]:
        """Device buffers it keeps for rows of so many positions, weights included."""
        ...

    def phases(self, target: "Pass", chunk: int | None) -> tuple[tuple[Buffer, ...], ...]:
        """Sets of buffers that live at once while it drafts beside a target whose verification is ``target``;
        ``chunk``: while it reads so much of a prompt.
        """
        ...
