"""The target's KV cache: one ``(keys, values)`` pair a layer, each ``[B, K, S, D]``.

Layers are separate buffers and never stacked, so that XLA aliases every one of them
with its donated input (a scan over a stacked cache doubles it). In int8, which is lossy, each of keys and
values is a `Quantized`: whole numbers, and a scale for every slot of every head (as KIVI's values, arXiv
2402.02750, section 3, with one group a head).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Leaf = Any  # an array, or what JAX puts in its place when a state is described and not allocated
KVCache = tuple[tuple[Leaf, Leaf], ...]  # of arrays, or of `Quantized`
NewKV = tuple[tuple[Leaf, Leaf], ...]
# Logical axes of each buffer, as parameters carry theirs in their metadata.
KV_AXES = ("batch", "kv_heads", "context", "head_dim")
_MOST = 127  # of int8, so that a range is symmetric


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


def capacity_of(cache: KVCache) -> int:
    """S."""
    return jax.tree.leaves(cache)[0].shape[2]


def select_rows(cache: KVCache, rows: Int[Array, " R"]) -> KVCache:
    """Some rows of a cache, a copy unless it has only one."""
    if jax.tree.leaves(cache)[0].shape[0] == 1:
        return cache
    return jax.tree.map(lambda buffer: buffer[rows], cache)


def write(
    cache: KVCache, new: NewKV, starts: Int[Array, " R"], rows: Int[Array, " R"], platform: str
) -> KVCache:
    """Write ``new`` (a layer's ``(k, v)``, each ``[R, K, T, D]`` and quantized if the cache is) into ``rows``
    from ``starts`` on, in place.

    Needs ``starts + T <= S``: ``dynamic_update_slice`` would clamp the start silently.
    For XLA to do it without copying the cache, ``starts`` must depend on a result of
    every read of the old cache in the same program.
    """
    put = _put_on_cpu if platform == "cpu" else _put
    return jax.tree.map(lambda old, add: put(old, add.astype(old.dtype), starts, rows), cache, new)


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


def grow(cache: KVCache, capacity: int) -> KVCache:
    """The same cache with ``capacity`` slots a row, layer by layer; an old layer is freed once copied."""
    more = ((0, 0), (0, 0), (0, capacity - capacity_of(cache)), (0, 0))
    grown = []
    for pair in cache:
        wider = jax.tree.map(lambda buffer: jnp.pad(buffer, more), pair)
        jax.block_until_ready(wider)
        for buffer in jax.tree.leaves(pair):
            buffer.delete()
        grown.append(wider)
    return tuple(grown)
