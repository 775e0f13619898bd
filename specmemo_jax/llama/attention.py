"""Attention of T new nodes over a row's committed cache and over their own ancestors.

The new nodes' keys and values are not in the cache yet: the cache is only read, and
the softmax runs over both parts at once. Rejected branches are therefore never written
anywhere (`specmemo_jax.decode.step` commits the accepted path through `kv.write`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.llama import kv
from specmemo_jax.llama.kv import Leaf, RowTiles, SlotsLast, ordered_after

NEG_INF = -1e30
TILE, TILED_NODES = 256, 32  # slots of a tile, and nodes of one row from which the cache is read in tiles
Dot = Callable[[str, Array, Array], Array]


def in_tiles(rows: int, nodes: int, platform: str) -> bool:
    """Whether so many nodes of so many rows read the cache in tiles, as far as it is used: a prompt's chunk
    on CPU. Fewer nodes would wait for the tiles' copies, and a GPU for the host at every tile.
    """
    return platform == "cpu" and rows == 1 and nodes >= TILED_NODES


@jax.named_scope("attention")
def tree_attention(
    q: Float[Array, "B T N D"],
    k_new: Float[Array, "B K M D"],
    v_new: Float[Array, "B K M D"],
    cache: tuple[Leaf, Leaf] | RowTiles,
    ancestors: Bool[Array, "B T M"],
    lengths: Int[Array, " B"],
    dtype: jnp.dtype,
    precision: jax.lax.Precision | None,
) -> Float[Array, "B T N*D"]:
    """Scaled dot-product attention, grouped heads, scores and softmax in float32.

    ``cache``: keys and values ``[B, K, S, D]`` (or `SlotsLast`), of which row ``b`` uses the first
    ``lengths[b]``; of one row, its tiles. ``ancestors[b, i, j]`` says that node ``i`` of T sees node ``j`` of
    M, of which the T are the last (itself included). Of an int8 cache (`Quantized`) the whole numbers are
    multiplied, and the scales of the keys go onto the scores, those of the values onto their weights.
    """
    B, T, N, D = q.shape
    K = k_new.shape[1]
    G = N // K

    def dot(spec: str, a: Array, b: Array) -> Array:
        return jnp.einsum(
            spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32
        )

    q = (q * D**-0.5).reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    # Two rows at least: for a single one XLA converts a 16-bit cache to float32 (CPU) or transposes it (GPU).
    on_cpu = precision is None
    queries, spare = G * T, int(G * T == 1 and not (on_cpu and jnp.dtype(dtype) == jnp.float32))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, spare), (0, 0)))
    # Two products: XLA's GPU backend would merge them over a copy of the cache beside the new keys.
    tree = dot("bkqd,bktd->bkqt", q if on_cpu else optimization_barrier(q), k_new)
    seen = jnp.broadcast_to(ancestors[:, None, None], (B, K, G, T, ancestors.shape[2])).reshape(
        B, K, queries, -1
    )
    tree = jnp.where(jnp.pad(seen, ((0, 0), (0, 0), (0, spare), (0, 0)), constant_values=True), tree, NEG_INF)
    if isinstance(cache, RowTiles):
        out = _tiled(q, cache, tree, v_new, lengths, dot)
    else:
        out = _whole(q, *cache, tree, v_new, lengths, dot, on_cpu)
    return out[:, :, :queries].reshape(B, K, G, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, N * D)


def _whole(
    q: Array, k_cache: Leaf, v_cache: Leaf, tree: Array, v_new: Array, lengths: Array, dot: Dot, on_cpu: bool
) -> Float[Array, "B K Q D"]:
    """Every slot of the cache at once, and the nodes; ``tree``: the nodes' masked scores."""
    spec, (keys, k_scales), (values, v_scales) = _scores(k_cache), kv.numbers(k_cache), kv.numbers(v_cache)
    if k_scales is not None and on_cpu:  # XLA would convert the caches of all layers before the first one
        keys = keys + ordered_after(jnp.zeros((), keys.dtype), q)
    past = dot(spec, q, keys)
    if k_scales is not None:
        past = past * k_scales[:, :, None]
    committed = jnp.arange(values.shape[2])[None, :] < lengths[:, None]
    past = jnp.where(committed[:, None, None, :], past, NEG_INF)
    top = jnp.maximum(past.max(-1, keepdims=True), tree.max(-1, keepdims=True))
    past, tree = jnp.exp(past - top), jnp.exp(tree - top)
    total = past.sum(-1, keepdims=True) + tree.sum(-1, keepdims=True)
    if v_scales is not None:
        past = past * v_scales[:, :, None]
        values = values + ordered_after(jnp.zeros((), values.dtype), past) if on_cpu else values
    out = dot("bkqs,bksd->bkqd", past, values) + dot("bkqt,bktd->bkqd", tree, v_new)
    return out / total


def _tiled(
    q: Array, cache: RowTiles, tree: Array, v_new: Array, length: Array, dot: Dot
) -> Float[Array, "1 K Q D"]:
    """The nodes, then the used part of one row tile by tile, each time with the softmax so far scaled to the
    largest score so far (Milakov and Gimelshein, arXiv 1805.02867).
    """
    tile, top = cache.size, tree.max(-1, keepdims=True)
    weights = jnp.exp(tree - top)
    start = top, weights.sum(-1, keepdims=True), dot("bkqt,bktd->bkqd", weights, v_new)

    def add_tile(i: Array, sofar: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = sofar
        k_tile, v_tile = cache.read(i * tile)
        (keys, k_scales), (values, v_scales) = kv.numbers(k_tile), kv.numbers(v_tile)
        past = dot(_scores(k_tile), q, keys)
        if k_scales is not None:
            past = past * k_scales[:, :, None]
        past = jnp.where(i * tile + jnp.arange(tile) < length, past, NEG_INF)
        higher = jnp.maximum(top, past.max(-1, keepdims=True))
        shrunk, weights = jnp.exp(top - higher), jnp.exp(past - higher)
        total = total * shrunk + weights.sum(-1, keepdims=True)
        if v_scales is not None:
            weights = weights * v_scales[:, :, None]
        return higher, total, out * shrunk + dot("bkqs,bksd->bkqd", weights, values)

    _, total, out = jax.lax.fori_loop(0, -(-length[0] // tile), add_tile, start)
    return out / total


def _scores(k_cache: Leaf) -> str:
    return "bkqd,bkds->bkqs" if isinstance(k_cache, SlotsLast) else "bkqd,bksd->bkqs"
