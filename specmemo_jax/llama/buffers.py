"""What the memory model knows of a device buffer, and of a drafter."""

import dataclasses
from typing import Literal

from specmemo_jax.llama.kv import Groups

Kind = Literal["state", "cache", "weights"]


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A device buffer by name: its shape, dtype and bytes, before it exists.

    ``kind``: a ``"cache"`` leads with its layers and grows layer by layer; ``"weights"`` never grow or move;
    other ``"state"`` grows as a whole, and leads with the batch.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    kind: Kind = "state"


def cache_buffer(
    name: str, groups: Groups, vector: tuple[int, int, int, int], dtype: str, itemsize: int
) -> Buffer:
    """Keys and values of rows in ``groups``; ``vector``: layers, 2, K, and D numbers (or 1, of scales)."""
    layers, two, heads, length = vector
    bytes_ = layers * two * heads * length * itemsize * groups.total
    if len(groups.sizes) == 1:
        return Buffer(name, (layers, two, groups.rows, heads, groups.most, length), dtype, bytes_, "cache")
    return Buffer(name, (layers, two, heads, groups.total, length), dtype, bytes_, "cache")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one step's drafting costs a device: passes of a model with ``layers`` in all, floating-point
    operations, and bytes read.
    """

    layers: int = 0
    flops: float = 0.0
    bytes: float = 0.0
