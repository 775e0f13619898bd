"""Draft heads in the form that is trained: pure functions over float32 masters named as in `HeadConfig`.

Slot p of a row holds token p + 1 and the target's features at p, at position p, and foretells token p + 2.
A head's own outputs take the place of the target's features in the unrolled steps (EAGLE-3's training-time
test, arXiv 2503.01840, section 3.2): at step i slot p reads what slot p - 1 put out at step i - 1, so its
attention sees the target's features up to slot p - i and the head's own after them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from specmemo_jax.draft.head_config import HeadConfig
from specmemo_jax.llama.rope import rotate
from specmemo_jax.train.products import linear, norm, product

Params = dict[str, Array]
KeysValues = tuple[Array, Array]


def shifted(x: Array, slots: int) -> Array:
    """``x`` ``[B, T, ...]`` moved ``slots`` later; earlier where they are negative. Zeros come in."""
    if slots == 0:
        return x
    rest = [(0, 0)] * (x.ndim - 2)
    if slots > 0:
        return jnp.pad(x, [(0, 0), (slots, 0), *rest])[:, : x.shape[1]]
    return jnp.pad(x, [(0, 0), (0, -slots), *rest])[:, -slots:]


def scope(head: HeadConfig) -> str:
    """What the names of its decoder layer's tensors begin with."""
    return "midlayer" if head.kind == "eagle3" else "layers.0"


def first_state(head: HeadConfig, params: Params, features: Float[Array, "B T F"], dtype: Any) -> Array:
    """``[B, T, H]``: what the layer reads of the target's features. EAGLE-3 mixes its taps once, here."""
    return linear(features, params["fc.weight"], dtype) if head.kind == "eagle3" else features


def step(
    head: HeadConfig,
    params: Params,
    embedded: Float[Array, "B T H"],
    state: Float[Array, "B T H"],
    rotary: tuple[Array, Array],
    sees: Bool[Array, "B T T"],
    past: tuple[KeysValues, ...],
    dtype: Any,
) -> tuple[Float[Array, "B T H"], KeysValues]:
    """One unrolled step: what each slot puts out (float32), and its keys and values ``[B, T, K, D]``.

    ``embedded``: of the slots' tokens. ``state``: `first_state`, or the last step's outputs one slot later.
    ``sees``: which slots' keys of step 0 a slot attends to in this step. ``past``: the earlier steps' keys
    and values.
    """
    c, eps, prefix = head.layer, head.layer.rms_norm_eps, scope(head)
    (B, T, _), N, K, D = state.shape, c.num_heads, c.num_kv_heads, c.head_dim
    if head.kind == "eagle3":
        x = state.astype(jnp.float32)
        parts = (
            norm(embedded, params[f"{prefix}.input_layernorm.weight"], eps),
            norm(x, params[f"{prefix}.hidden_norm.weight"], eps),
        )
        inner = jnp.concatenate([part.astype(dtype) for part in parts], axis=-1)
    else:
        both = jnp.concatenate([embedded.astype(dtype), state.astype(dtype)], axis=-1)
        x = linear(both, params["fc.weight"], dtype)
        if head.fc_bias:
            x = x + params["fc.bias"][None, None]
        inner = x
    names = [f"{prefix}.self_attn.{name}_proj.weight" for name in "qkv"]
    qkv = linear(inner, jnp.concatenate([params[name] for name in names]), dtype)
    qkv = qkv.reshape(B, T, N + 2 * K, D)
    qk = rotate(qkv[:, :, : N + K], *rotary)
    q, k, v = qk[:, :, :N].reshape(B, T, K, N // K, D), qk[:, :, N:], qkv[:, :, N + K :]
    own = (k.astype(dtype), v.astype(dtype))
    attended = attend(q, (*past, own), sees, dtype).reshape(B, T, N * D)
    x = x + linear(attended, params[f"{prefix}.self_attn.o_proj.weight"], dtype)
    inner = norm(x, params[f"{prefix}.post_attention_layernorm.weight"], eps)
    gate, up = (linear(inner, params[f"{prefix}.mlp.{name}_proj.weight"], dtype) for name in ("gate", "up"))
    return x + linear(jax.nn.silu(gate) * up, params[f"{prefix}.mlp.down_proj.weight"], dtype), own


def attend(
    q: Float[Array, "B T K G D"], keys_values: tuple[KeysValues, ...], sees: Bool[Array, "B T T"], dtype: Any
) -> Float[Array, "B T K G D"]:
    """Attention of the last of the steps: to step 0 as ``sees`` says, and of each step j after it to the one
    slot that this step's chain went through, i - j slots before. One softmax over both.
    """
    (first_k, first_v), *later = keys_values
    q = q * jnp.float32(q.shape[-1] ** -0.5)
    scores = product("btkgd,bskd->bkgts", q, first_k, dtype)
    scores = jnp.where(sees[:, None, None], scores, jnp.float32(-1e30))
    if not later:
        return product("bkgts,bskd->btkgd", jax.nn.softmax(scores), first_v, dtype)
    i = len(later)
    chain = [tuple(shifted(x, i - j).astype(jnp.float32) for x in pair) for j, pair in enumerate(later, 1)]
    single = jnp.stack([jnp.sum(q * k[:, :, :, None], axis=-1) for k, _ in chain])  # [i, B, T, K, G]
    top = jnp.maximum(jnp.max(scores, axis=-1), jnp.max(single, axis=0).transpose(0, 2, 3, 1))
    top = jax.lax.stop_gradient(top)  # [B, K, G, T]
    scores = jnp.exp(scores - top[..., None])
    single = jnp.exp(single - top.transpose(0, 3, 1, 2)[None])
    total = jnp.sum(scores, axis=-1).transpose(0, 3, 1, 2) + jnp.sum(single, axis=0)
    attended = product("bkgts,bskd->btkgd", scores, first_v, dtype)
    for weight, (_, v) in zip(single, chain, strict=True):
        attended = attended + weight[..., None] * v[:, :, :, None]
    return attended / total[..., None]


def scored(head: HeadConfig, params: Params, out: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
    """What the rows of the head's vocabulary are multiplied with: EAGLE-3 has a norm of its own before it."""
    return norm(out, params["norm.weight"], head.layer.rms_norm_eps) if head.kind == "eagle3" else out


def medusa_state(
    params: Params, i: int, features: Float[Array, "B T H"], dtype: Any
) -> Float[Array, "B T H"]:
    """Medusa's head ``i`` before its rows: ``f + SiLU(A f + b)``, float32."""
    y = linear(features, params[f"{i}.0.linear.weight"], dtype) + params[f"{i}.0.linear.bias"][None, None]
    return features.astype(jnp.float32) + jax.nn.silu(y)
