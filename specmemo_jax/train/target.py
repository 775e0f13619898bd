"""The frozen target in training: one causal pass over whole rows, and what a head reads of it.

Its layers are stacked and scanned, so that a pass compiles in the time of one layer; over thousands of tokens
the copy of a layer's weights that this costs is nothing, which it is not in decoding (llama/model.py).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.checkpoints.open import OpenModel
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.packing import abstract_model, pack
from specmemo_jax.llama.rope import rope_tables, rotate
from specmemo_jax.train.products import chunk_size, linear, norm, product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetWeights:
    """Embedding and head ``[V, H]`` (one array where they are tied), the final norm ``[H]``, and each
    packed tensor of the layers (`specmemo_jax.llama.packing`) by its name within a layer, ``[L, ...]``.
    """

    embedding: Array
    head: Array
    norm: Array
    layers: dict[str, Array]

    @property
    def dtype(self) -> Any:
        """The weights' dtype."""
        return self.embedding.dtype


def load_target(opened: OpenModel, dtype: Any) -> TargetWeights:
    """The model's weights on the first device, in ``dtype``. Raises WeightsError as `pack` does."""
    packed = pack(opened.config, opened.tensors(), jnp.dtype(dtype))
    names = abstract_model(opened.config, packed.dtype, 1, packed.platform)[2]
    leaves = dict(zip(names, packed.leaves, strict=True))
    del packed
    layers: dict[str, Array] = {}
    for name in [name.removeprefix("layers.0.") for name in leaves if name.startswith("layers.0.")]:
        parts = [leaves.pop(f"layers.{i}.{name}") for i in range(opened.config.num_layers)]
        layers[name] = jnp.stack(parts)
    embedding = leaves["embed_tokens"]
    return TargetWeights(embedding, leaves.get("lm_head", embedding), leaves["norm.weight"], layers)


def read(
    config: LlamaConfig,
    weights: TargetWeights,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    sees: Bool[Array, "B T T"],
    taps: tuple[int, ...],
) -> tuple[Float[Array, "B T F"], Float[Array, "B T H"]]:
    """The hidden states entering the layers ``taps`` side by side (F = len(taps) * H; the number of layers
    means after the final norm), and those after the final norm; both in the weights' dtype.

    ``sees``: which tokens a token attends to.
    """
    dtype, rotary = weights.dtype, rope_tables(config, positions)
    wanted = jnp.asarray(taps, jnp.int32)

    def layer(state: Any, scanned: Any) -> tuple[Any, None]:
        x, tapped, i = state
        here = (wanted == i)[:, None, None, None]
        tapped = jnp.where(here, x.astype(dtype)[None], tapped)
        x, _ = block(config, scanned, x, rotary, partial(attend_whole, sees, dtype), dtype)
        return (x, tapped, i + jnp.int32(1)), None

    x = weights.embedding[tokens].astype(jnp.float32)
    tapped = jnp.zeros((len(taps), *x.shape), dtype)
    (x, tapped, _), _ = jax.lax.scan(layer, (x, tapped, jnp.int32(0)), weights.layers)
    final = norm(x, weights.norm, config.rms_norm_eps).astype(dtype)
    tapped = jnp.where((wanted == config.num_layers)[:, None, None, None], final[None], tapped)
    return jnp.concatenate(list(tapped), axis=-1), final


def block(
    config: LlamaConfig,
    layer: dict[str, Array],
    x: Array,
    rotary: Any,
    attend: Callable[..., Any],
    dtype: Any,
) -> tuple[Float[Array, "B T H"], Any]:
    """One decoder layer: the residual after it, float32, and what ``attend(q, k, v)`` gives beside the
    attended values ``[B, T, K, G, D]``.
    """
    (B, T, _), N, K, D = x.shape, config.num_heads, config.num_kv_heads, config.head_dim

    def project(x: Array, name: str) -> Array:
        y, bias = linear(x, layer[f"{name}.weight"], dtype), layer.get(f"{name}.bias")
        return y if bias is None else y + bias.astype(jnp.float32)[None, None]

    inner = norm(x, layer["input_layernorm.weight"], config.rms_norm_eps)
    qkv = project(inner, "self_attn.qkv_proj").reshape(B, T, N + 2 * K, D)
    qk = rotate(qkv[:, :, : N + K], *rotary)
    attended, beside = attend(
        qk[:, :, :N].reshape(B, T, K, N // K, D) * jnp.float32(D**-0.5), qk[:, :, N:], qkv[:, :, N + K :]
    )
    x = x + project(attended.reshape(B, T, N * D), "self_attn.o_proj")
    inner = norm(x, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
    gate, up = jnp.split(project(inner, "mlp.gate_up_proj"), 2, axis=-1)
    return x + project(jax.nn.silu(gate) * up, "mlp.down_proj"), beside


def attend_whole(sees: Bool[Array, "B T T"], dtype: Any, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
    """Attention within whole rows, and their keys and values in ``dtype``."""
    scores = product("btkgd,bskd->bkgts", q, k, dtype)
    scores = jnp.where(sees[:, None, None], scores, jnp.float32(-1e30))
    attended = product("bkgts,bskd->btkgd", jax.nn.softmax(scores), v, dtype)
    return attended, (k.astype(dtype), v.astype(dtype))


def likeliest(weights: TargetWeights, final: Float[Array, "B T H"], rows: int = 2048) -> Int[Array, "B T"]:
    """The target's greedy token after every position, ``rows`` positions' logits at a time."""
    (B, T, H), dtype = final.shape, weights.dtype
    chunk = chunk_size(B * T, rows)

    def best(x: Array) -> Array:
        return jnp.argmax(linear(x, weights.head, dtype), axis=-1).astype(jnp.int32)

    return jax.lax.map(best, final.reshape(-1, chunk, H)).reshape(B, T)
