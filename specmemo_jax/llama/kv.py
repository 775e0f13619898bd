"""The target's KV cache: groups of rows, a ``(keys, values)`` pair a layer in each, ``[B, K, S, D]``.

Rows of a group have the same number of slots S, so that short ones need not be as wide as the longest
(`Groups`). Layers are separate buffers and never stacked, so that XLA aliases every one of them
with its donated input (a scan over a stacked cache doubles it). In int8, which is lossy, each of keys and
values is a `Quantized`: whole numbers, and a scale for every slot of every head (as KIVI's values, arXiv
2402.02750, section 3, with one group a head).

Keys may lie with the slots last (`SlotsLast`), where `keys_slots_last` says that this is faster.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Leaf = Any  # an array, or what JAX puts in its place when a state is described and not allocated
KVCache = tuple[tuple[Leaf, Leaf], ...]  # of arrays, `SlotsLast` (keys only) or `Quantized`
Caches = tuple[KVCache, ...]  # a group's each, in the order of their rows
NewKV = tuple[tuple[Leaf, Leaf], ...]
RowAt = tuple[int, Int[Array, ""]]  # a row among all, and before it the group that it is of
# Logical axes that lead each buffer, as parameters carry theirs in their metadata.
KV_AXES = ("batch", "kv_heads")
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotsLast:
    """Keys ``[B, K, D, S]``."""

    keys: Leaf


def keys_slots_last(dtype: jnp.dtype, platform: str) -> bool:
    """Whether a cache of ``dtype`` has its keys as `SlotsLast`: in float32 on CPU, where XLA's kernels turn
    them at every read otherwise, which takes longer than multiplying them. In 16 bits they do not, and
    writing a slot takes ten times as long.
    """
    return platform == "cpu" and dtype == jnp.float32


def quantize(x: Array) -> Quantized:
    """``x`` ``[..., D]`` to the nearest of 255 steps a vector; its largest number is kept."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / _MOST
    values = jnp.round(x / jnp.where(scales > 0, scales, 1.0))
    return Quantized(values.astype(jnp.int8), scales)


def plain(x: Leaf) -> Array:
    """Keys or values as numbers ``[B, K, S, D]``, however the cache has them; of `Quantized` in float32."""
    if isinstance(x, SlotsLast):
        return x.keys.swapaxes(2, 3)
    return x.values.astype(jnp.float32) * x.scales if isinstance(x, Quantized) else jnp.asarray(x)


def numbers(side: Leaf) -> tuple[Array, Array | None]:
    """Keys or values of a cache as they lie, and the scales ``[B, K, S]`` of a `Quantized`."""
    if isinstance(side, Quantized):
        return side.values, side.scales[..., 0]
    return side.keys if isinstance(side, SlotsLast) else side, None


def num_slots(values: Leaf) -> int:
    """S of a layer's values."""
    return jax.tree.leaves(values)[0].shape[2]


@dataclasses.dataclass(frozen=True)
class RowTiles:
    """One row of a layer, ``size`` slots at a time: ``read(first slot)`` gives keys and values."""

    read: Callable[[Int[Array, ""]], tuple[Leaf, Leaf]]
    size: int


def row_tiles(pair: tuple[Leaf, Leaf], row: Int[Array, ""], size: int, after: Array) -> RowTiles:
    """``row`` of a layer's keys and values, to be read inside a loop in tiles of about ``size``.

    XLA's CPU backend would take 16-bit numbers into a loop as float32, all rows of them. So the row goes
    there as a copy of integers, which is made when ``after`` is there.
    """
    size = math.gcd(num_slots(pair[1]), size)
    keys, values = (_side_tiles(side, row, size, after) for side in pair)
    return RowTiles(lambda start: (keys(start), values(start)), size)


def _side_tiles(side: Leaf, row: Array, size: int, after: Array) -> Callable[[Array], Leaf]:
    axis = _slot_axis(side)

    def cut(buffer: Array, row: Array, start: Array) -> Array:
        sizes = (1, *(size if own == axis else buffer.shape[own] for own in (1, 2, 3)))
        return jax.lax.dynamic_slice(buffer, _corner(row, start, axis), sizes)

    if _is_side(side) or side.dtype.itemsize != 2:
        return lambda start: jax.tree.map(lambda buffer: cut(buffer, row, start), side)
    own = side[ordered_after(row, after)[None]]
    copy = ordered_after(jax.lax.bitcast_convert_type(own, jnp.uint16), after)
    return lambda start: jax.lax.bitcast_convert_type(cut(copy, jnp.int32(0), start), side.dtype)


def init_cache(
    num_layers: int, shape: tuple[int, int, int, int], dtype: jnp.dtype, slots_last: bool = False
) -> KVCache:
    """Zeroed cache buffers of ``shape`` ``(B, K, S, D)``; zeros, so that unread slots stay finite.
    ``slots_last``: the keys as `SlotsLast`.
    """
    B, K, S, D = shape

    def empty() -> Leaf:
        if dtype != jnp.int8:
            return jnp.zeros(shape, dtype)
        return Quantized(jnp.zeros(shape, dtype), jnp.zeros((*shape[:3], 1), jnp.float32))

    def empty_keys() -> Leaf:
        return SlotsLast(jnp.zeros((B, K, D, S), dtype)) if slots_last else empty()

    return tuple((empty_keys(), empty()) for _ in range(num_layers))


def init_caches(
    num_layers: int, groups: Groups, heads: int, head_dim: int, dtype: jnp.dtype, slots_last: bool = False
) -> Caches:
    """Each group's `init_cache`, of ``heads`` K."""
    return tuple(
        init_cache(num_layers, (rows, heads, slots, head_dim), dtype, slots_last) for rows, slots in groups
    )


def capacity_of(caches: Caches) -> int:
    """S of the widest group."""
    return max(num_slots(values) for ((_, values), *_) in caches)


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


@jax.named_scope("commit")
def write(
    cache: KVCache, new: NewKV, starts: Int[Array, " R"], rows: Int[Array, " R"], platform: str
) -> KVCache:
    """Write ``new`` (a layer's ``(k, v)``, each ``[R, K, T, D]`` and quantized if the cache is) into ``rows``
    from ``starts`` on, in place.

    Needs ``starts + T <= S``: ``dynamic_update_slice`` would clamp the start silently.
    For XLA to do it without copying the cache, ``starts`` must come after every read of the old cache in the
    same program (`ordered_after`).
    """

    def as_cached(old: Leaf, add: Leaf) -> Leaf:
        return SlotsLast(add.swapaxes(2, 3)) if isinstance(old, SlotsLast) else add

    stored = tuple(
        tuple(as_cached(*side) for side in zip(old, add, strict=True))
        for old, add in zip(cache, new, strict=True)
    )
    return _put(cache, stored, starts, rows, platform)


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
    moved = _put(caches[wide], mine, jnp.zeros((1,), jnp.int32), place[None], platform)
    return replace(caches, wide, moved)


def _put(
    cache: KVCache, stored: KVCache, starts: Int[Array, " R"], rows: Int[Array, " R"], platform: str
) -> KVCache:
    """`write` of R rows that lie as the cache does."""
    if platform == "cpu":
        return _put_on_cpu(cache, stored, starts, rows)

    def put(buffer: Array, values: Array, axis: int) -> Array:
        slots = starts[:, None] + jnp.arange(values.shape[axis])[None, :]
        place = (rows[:, None], *(slots if own == axis else slice(None) for own in (1, 2, 3)))
        values = jnp.moveaxis(values.astype(buffer.dtype), axis, 1)
        return buffer.at[place].set(values, mode="promise_in_bounds", unique_indices=True)

    return _map_sides(put, cache, stored)


def _put_on_cpu(cache: KVCache, stored: KVCache, starts: Int[Array, " R"], rows: Int[Array, " R"]) -> KVCache:
    # XLA's CPU backend has no 16-bit float stores and would convert the whole buffer to
    # float32 and back at each write, so those travel as integers; the loop and the
    # ``where`` (always true) keep it from computing the write for every slot of the buffer.
    def put_row(i: Array, cache: KVCache) -> KVCache:
        def put(buffer: Array, values: Array, axis: int) -> Array:
            dtype, half = buffer.dtype, buffer.dtype.itemsize == 2
            as_int = (lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16)) if half else (lambda x: x)
            values = as_int(values.astype(dtype))
            update = jax.lax.dynamic_slice_in_dim(values, i, 1)
            update = jnp.where(starts[i] >= 0, update, jnp.zeros((), values.dtype))
            whole = jax.lax.dynamic_update_slice(as_int(buffer), update, _corner(rows[i], starts[i], axis))
            return jax.lax.bitcast_convert_type(whole, dtype) if half else whole

        return _map_sides(put, cache, stored)

    return jax.lax.fori_loop(0, starts.shape[0], put_row, cache)


def _map_sides(put: Callable[[Array, Array, int], Array], cache: KVCache, stored: KVCache) -> KVCache:
    """``put(buffer, values, axis of its slots)`` for every buffer."""

    def put_side(side: Leaf, values: Leaf) -> Leaf:
        return jax.tree.map(lambda x, y: put(x, y, _slot_axis(side)), side, values)

    return jax.tree.map(put_side, cache, stored, is_leaf=_is_side)


def _is_side(x: Any) -> bool:
    """Whether it is a layer's keys or values of a kind of their own, and not an array."""
    return isinstance(x, SlotsLast | Quantized)


def _slot_axis(side: Leaf) -> int:
    return 3 if isinstance(side, SlotsLast) else 2


def _corner(row: Array, slot: Array, axis: int) -> tuple[Array | int, ...]:
    """Where a row's slot begins in a buffer whose slots are on ``axis``."""
    return (row, *(slot if own == axis else 0 for own in (1, 2, 3)))


def grow(caches: Caches, groups: Groups) -> Caches:
    """The same rows with the slots that ``groups`` say, layer by layer; an old layer is freed once copied."""
    return tuple(_grow(cache, slots) for cache, (_, slots) in zip(caches, groups, strict=True))


def _grow(cache: KVCache, capacity: int) -> KVCache:
    more = capacity - capacity_of((cache,))
    if not more:
        return cache

    def widen(side: Leaf) -> Leaf:
        widths = [(0, more if axis == _slot_axis(side) else 0) for axis in range(4)]
        return jax.tree.map(lambda buffer: jnp.pad(buffer, widths), side)

    grown = []
    for pair in cache:
        wider = jax.tree.map(widen, pair, is_leaf=_is_side)
        jax.block_until_ready(wider)
        for buffer in jax.tree.leaves(pair):
            buffer.delete()
        grown.append(wider)
    return tuple(grown)
