"""What the memory model knows of a device buffer, and of a drafter."""

import dataclasses
from typing import Protocol, runtime_checkable

from specmemo_jax.llama.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A device buffer by name: its shape, dtype and bytes, before it exists."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


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

    def buffers(self, batch: int, capacity: int) -> tuple[Buffer, ...]:
        """Device buffers it keeps for ``batch`` rows of ``capacity`` positions, weights included."""
        ...

    def temporary_bytes(self, config: LlamaConfig, batch: int, capacity: int) -> int:
        """A bound on what drafting for a target of ``config`` needs while a program runs."""
        ...
