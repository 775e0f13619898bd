"""Attention of T new nodes over a row's committed cache and over their own ancestors.

The new nodes' keys and values are not in the cache yet: the cache is only read, and
the softmax runs over both parts at once. Rejected branches are therefore never written
anywhere (`specmemo_jax.decode.step` commits the accepted path through `kv.write`).
"""

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.llama.kv import Leaf, Quantized, ordered_after

NEG_INF = -1e30


def tree_attention(
    q: Float[Array, "B T N D"],
    k_new: Float[Array, "B K M D"],
    v_new: Float[Array, "B K M D"],
    k_cache: Leaf,
    v_cache: Leaf,
    ancestors: Bool[Array, "B T M"],
    lengths: Int[Array, " B"],
    dtype: jnp.dtype,
    precision: jax.lax.Precision | None,
) -> Float[Array, "B T N*D"]:
    """Scaled dot-product attention, grouped heads, scores and softmax in float32.

    ``k_cache`` and ``v_cache`` are ``[B, K, S, D]``, of which row ``b`` uses the first
    ``lengths[b]``; ``ancestors[b, i, j]`` says that node ``i`` of T sees node ``j`` of M, of
    which the T are the last (itself included). Of an int8 cache (`Quantized`) the whole numbers are
    multiplied, and the scales of the keys go onto the scores, those of the values onto their weights.
    """
    B, T, N, D = q.shape
    k_scales = v_scales = None
    if isinstance(k_cache, Quantized):
        k_cache, k_scales = k_cache.values, k_cache.scales[..., 0]
        v_cache, v_scales = v_cache.values, v_cache.scales[..., 0]
    K, S = k_cache.shape[1], k_cache.shape[2]
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
    if k_scales is not None and on_cpu:  # XLA would convert the caches of all layers before the first one
        k_cache = k_cache + ordered_after(jnp.zeros((), k_cache.dtype), q)
    past = dot("bkqd,bksd->bkqs", q, k_cache)
    if k_scales is not None:
        past = past * k_scales[:, :, None]
    # Two products: XLA's GPU backend would merge them over a copy of the cache beside the new keys.
    tree = dot("bkqd,bktd->bkqt", q if on_cpu else optimization_barrier(q), k_new)
    committed = jnp.arange(S)[None, :] < lengths[:, None]
    past = jnp.where(committed[:, None, None, :], past, NEG_INF)
    seen = jnp.broadcast_to(ancestors[:, None, None], (B, K, G, T, ancestors.shape[2])).reshape(
        B, K, queries, -1
    )
    tree = jnp.where(jnp.pad(seen, ((0, 0), (0, 0), (0, spare), (0, 0)), constant_values=True), tree, NEG_INF)
    top = jnp.maximum(past.max(-1, keepdims=True), tree.max(-1, keepdims=True))
    past, tree = jnp.exp(past - top), jnp.exp(tree - top)
    total = past.sum(-1, keepdims=True) + tree.sum(-1, keepdims=True)
    if v_scales is not None:
        past = past * v_scales[:, :, None]
        v_cache = v_cache + ordered_after(jnp.zeros((), v_cache.dtype), past) if on_cpu else v_cache
    out = dot("bkqs,bksd->bkqd", past, v_cache) + dot("bkqt,bktd->bkqd", tree, v_new)
    out = (out / total)[:, :, :queries].reshape(B, K, G, T, D)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N * D)
