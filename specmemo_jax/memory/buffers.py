"""What the memory model knows of a device buffer, and of a drafter."""

import dataclasses

from specmemo_jax.llama.kv import Groups


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
class Cost:
    """What one step's drafting costs a device: passes of a model with ``layers`` in all, floating-point
    operations, and bytes read.
    """

    layers: int = 0
    flops: float = 0.0
    bytes: float = 0.0
