"""The target's KV cache: groups of rows, a ``(keys, values)`` pair a layer in each, ``[B, K, S, D]``.

Rows of a group have the same number of slots S, so that short ones need not be as wide as the longest
(`Groups`). Layers are separate buffers and never stacked, so that XLA aliases every one of them
with its donated input (a scan over a stacked cache doubles it). In int8, which is lossy, each of keys and
values is a `Quantized`: whole numbers, and a scale for every slot of every head (as KIVI's values, arXiv
2402.02750, section 3, with one group a head).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Leaf = Any  # an array, or what JAX puts in its place when a state is described and not allocated
KVCache = tuple[tuple[Leaf, Leaf], ...]  # of arrays, or of `Quantized`
Caches = tuple[KVCache, ...]  # a group's each, in the order of their rows
NewKV = tuple[tuple[Leaf, Leaf], ...]
RowAt = tuple[int, Int[Array, ""]]  # a row among all, and before it the group that it is of
# Logical axes of each buffer, as parameters carry theirs in their metadata.
KV_AXES = ("batch", "kv_heads", "context", "head_dim")
SLOTS = 64  # a row's cache slots are multiples of it
_MOST = 127  # of int8, so that a range is symmetric


@dataclasses.dataclass(frozen=True)
class Groups:
    """``(rows, slots)`` of each group, in the order of the rows."""

    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, rows: int, slots: int) -> "Groups":
        """One group."""
        return cls(((rows, slots),))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.sizes)

    @property
    def rows(self) -> int:
        """B, of all groups."""
        return sum(rows for rows, _ in self.sizes)

    @property
    def most(self) -> int:
        """S of the widest."""
        return max(slots for _, slots in self.sizes)

    @property
    def total(self) -> int:
        """Slots of all rows."""
        return sum(rows * slots for rows, slots in self.sizes)

    def within(self, slots: int) -> "Groups":
        """The same with at most ``slots`` a row."""
        return Groups(tuple((rows, min(own, slots)) for rows, own in self.sizes))

    def place(self, row: int) -> tuple[int, int]:
        """The group that a row is of, and that group's first row."""
        first = 0
        for group, (rows, _) in enumerate(self.sizes):
            if row < first + rows:
                return group, first
            first += rows
        raise IndexError(f"row {row} of {self.rows}")

    def slots_of(self, row: int) -> int:
        """S of a row."""
        return self.sizes[self.place(row)[0]][1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """``values`` int8 ``[B, K, S, D]`` times ``scales`` float32 ``[B, K, S, 1]``."""

    values: Leaf
    scales: Leaf


def quantize(x: Array) -> Quantized:
    """``x`` ``[..., D]`` to the nearest of 255 steps a vector; its largest number is kept."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / _MOST
    values = jnp.round(x / jnp.where(scales > 0, scales, 1.0))
    return Quantized(values.astype(jnp.int8), scales)


def dequantize(x: Leaf) -> Array:
    """The numbers that a `Quantized` stands for, float32; an array as it is."""
    whole = isinstance(x, Quantized)
    return x.values.astype(jnp.float32) * x.scales if whole else jnp.asarray(x)


def init_cache(num_layers: int, shape: tuple[int, int, int, int], dtype: jnp.dtype) -> KVCache:
    """Zeroed cache buffers of ``shape`` ``(B, K, S, D)``; zeros, so that unread slots stay finite."""

    def empty() -> Leaf:
        if dtype != jnp.int8:
            return jnp.zeros(shape, dtype)
        return Quantized(jnp.zeros(shape, dtype), jnp.zeros((*shape[:3], 1), jnp.float32))

    return tuple((empty(), empty()) for _ in range(num_layers))


def init_caches(num_layers: int, groups: Groups, heads: int, head_dim: int, dtype: jnp.dtype) -> Caches:
    """Each group's `init_cache`, of ``heads`` K."""
    return tuple(init_cache(num_layers, (rows, heads, slots, head_dim), dtype) for rows, slots in groups)


def capacity_of(caches: Caches) -> int:
    """S of the widest group."""
    return max(jax.tree.leaves(cache)[0].shape[2] for cache in caches)


def spans(caches: Caches | KVCache) -> Iterator[slice]:
    """Each group's rows among all; of whole caches or of one layer's."""
    first = 0
    for cache in caches:
        rows = jax.tree.leaves(cache)[0].shape[0]
        yield slice(first, first + rows)
        first += rows


def select_rows(cache: KVCache, rows: Int[Array, " R"]) -> KVCache:
    """Some rows of a cache's layers, a copy unless it has only one."""
    if jax.tree.leaves(cache)[0].shape[0] == 1:
        return cache
    return jax.tree.map(lambda buffer: buffer[rows], cache)


def ordered_after(value: Array, result: Array) -> Array:
    """``value``, in a way that XLA cannot have it before it has ``result``.

    The order in which a program reads and writes a cache decides whether XLA copies it. A donated buffer
    is written in place only if every read of it comes first: so the place of the write (`write`'s
    ``starts``) has to come after a result of those reads. And what depends on nothing is made for all
    layers before the first one runs. Where ``result`` has another shape, its first element counts.
    """
    if result.shape != value.shape:
        result = result[(0,) * result.ndim]
    # Always true, also of nan; XLA does not see it.
    return jnp.where((result < 0).astype(jnp.int32) >= 0, value, jnp.zeros((), value.dtype))


def write(
    cache: KVCache, new: NewKV, starts: Int[Array, " R"], rows: Int[Array, " R"], platform: str
) -> KVCache:
    """Write ``new`` (a layer's ``(k, v)``, each ``[R, K, T, D]`` and quantized if the cache is) into ``rows``
    from ``starts`` on, in place.

    Needs ``starts + T <= S``: ``dynamic_update_slice`` would clamp the start silently.
    For XLA to do it without copying the cache, ``starts`` must come after every read of the old cache in the
    same program (`ordered_after`).
    """
    put = _put_on_cpu if platform == "cpu" else _put
    return jax.tree.map(lambda old, add: put(old, add.astype(old.dtype), starts, rows), cache, new)


def write_every(caches: Caches, new: NewKV, starts: Int[Array, " B"], platform: str) -> Caches:
    """`write` for every row of every group; ``new`` has them all, ``[B, K, T, D]``."""
    written = []
    for cache, span in zip(caches, spans(caches), strict=True):
        own = new if len(caches) == 1 else jax.tree.map(lambda x: x[span], new)  # noqa: B023
        rows = jnp.arange(span.stop - span.start)
        written.append(write(cache, own, starts[span], rows, platform))
    return tuple(written)


def first_row(caches: Caches, group: int) -> int:
    """The first row of a group among all."""
    return list(spans(caches))[group].start


def replace(caches: Caches, group: int, cache: KVCache) -> Caches:
    """The caches with another one for a group."""
    return (*caches[:group], cache, *caches[group + 1 :])


def move_row(caches: Caches, source: RowAt, target: RowAt, platform: str) -> Caches:
    """Copy a row to one of a wider group."""
    (narrow, row), (wide, to) = source, target
    own, place = row - first_row(caches, narrow), to - first_row(caches, wide)
    mine = jax.tree.map(lambda buffer: jax.lax.dynamic_slice_in_dim(buffer, own, 1), caches[narrow])
    moved = write(caches[wide], mine, jnp.zeros((1,), jnp.int32), place[None], platform)
    return replace(caches, wide, moved)


def _put(buffer: Array, values: Array, starts: Int[Array, " R"], rows: Int[Array, " R"]) -> Array:
    slots = starts[:, None] + jnp.arange(values.shape[2])[None, :]
    moved = values.transpose(0, 2, 1, 3)
    return buffer.at[rows[:, None], :, slots].set(moved, mode="promise_in_bounds", unique_indices=True)


def _put_on_cpu(buffer: Array, values: Array, starts: Int[Array, " R"], rows: Int[Array, " R"]) -> Array:
    # XLA's CPU backend has no 16-bit float stores and would convert the whole buffer to
    # float32 and back at each write, so those travel as integers; the loop and the
    # ``where`` (always true) keep it from computing the write for every slot of the buffer.
    dtype, half = buffer.dtype, buffer.dtype.itemsize == 2
    as_int = (lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16)) if half else (lambda x: x)
    values = as_int(values)

    def put_row(i: Array, buffer: Array) -> Array:
        update = jax.lax.dynamic_slice_in_dim(values, i, 1)
        update = jnp.where(starts[i] >= 0, update, jnp.zeros((), values.dtype))
        whole = jax.lax.dynamic_update_slice(as_int(buffer), update, (rows[i], 0, starts[i], 0))
        return jax.lax.bitcast_convert_type(whole, dtype) if half else whole

    return jax.lax.fori_loop(0, values.shape[0], put_row, buffer)


def grow(caches: Caches, groups: Groups) -> Caches:
    """The same rows with the slots that ``groups`` say, layer by layer; an old layer is freed once copied."""
    return tuple(_grow(cache, slots) for cache, (_, slots) in zip(caches, groups, strict=True))


def _grow(cache: KVCache, capacity: int) -> KVCache:
    if capacity == capacity_of((cache,)):
        return cache
    more = ((0, 0), (0, 0), (0, capacity - capacity_of((cache,))), (0, 0))
    grown = []
    for pair in cache:
        wider = jax.tree.map(lambda buffer: jnp.pad(buffer, more), pair)
        jax.block_until_ready(wider)
        for buffer in jax.tree.leaves(pair):
            buffer.delete()
        grown.append(wider)
    return tuple(grown)
