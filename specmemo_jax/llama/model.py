"""Llama as Flax NNX modules and one pure forward for prefill and for verification.

Layers are unrolled on purpose: a scan over layers copies weights and cache (see
docs/performance-log.md). The modules hold *packed* weights (`specmemo_jax.llama.packing`):
query, key and value projections are one matrix, and so are gate and up.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import optimization_barrier
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.llama.attention import tree_attention
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Caches, Leaf, NewKV, Quantized, dequantize, quantize, select_rows, spans
from specmemo_jax.llama.layers import Linear, RMSNorm, matmul
from specmemo_jax.llama.rope import rope_tables, rotate


class Attention(nnx.Module):
    """Grouped-query attention with a fused QKV projection ``[(N + 2K) * D, H]``."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype):
        N, K, D, H = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        self.qkv_proj = Linear((N + 2 * K) * D, H, dtype, ("heads", "hidden"), config.attention_bias)
        self.o_proj = Linear(H, N * D, dtype, ("hidden", "heads"), config.attention_bias)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202) with fused gate and up projections ``[2F, H]``, shard by shard."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, shards: int = 1):
        H, F = config.hidden_size, config.ffn_size
        self.shards = shards
        self.gate_up_proj = Linear(2 * F, H, dtype, ("ffn", "hidden"), config.mlp_bias)
        self.down_proj = Linear(H, F, dtype, ("hidden", "ffn"), config.mlp_bias)

    def __call__(self, x: Float[Array, "B T H"], platform: str) -> Float[Array, "B T H"]:
        """``down(silu(gate(x)) * up(x))``, float32."""
        B, T, _ = x.shape
        both = self.gate_up_proj(x, platform).reshape(B, T, self.shards, 2, -1)
        return self.down_proj((jax.nn.silu(both[:, :, :, 0]) * both[:, :, :, 1]).reshape(B, T, -1), platform)


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, shards: int = 1):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, shards)


class Llama(nnx.Module):
    """A decoder-only Llama of any size; ``dtype`` is the weights' dtype.

    ``lm_head`` is None when the embedding table serves as the head. Fused projections hold
    ``shards`` blocks, each with its own devices' heads or ffn columns, so that splitting their rows
    over a mesh of so many devices gives every device whole heads.
    """

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, shards: int = 1):
        V, H = config.vocab_size, config.hidden_size
        self.embed_tokens = nnx.Param(jnp.zeros((V, H), dtype), axes=("vocab", "hidden"))
        self.layers = nnx.List([Block(config, dtype, shards) for _ in range(config.num_layers)])
        self.norm = RMSNorm(H, config.rms_norm_eps, dtype)
        self.lm_head = (
            None if config.tied_embeddings else nnx.Param(jnp.zeros((V, H), dtype), axes=("vocab", "hidden"))
        )
        self.config, self.shards = config, shards

    @property
    def dtype(self) -> jnp.dtype:
        """The weights' dtype."""
        return self.embed_tokens.dtype


def forward(
    model: Llama,
    caches: Caches,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    ancestors: Bool[Array, "B T M"],
    lengths: Int[Array, " B"],
    platform: str,
    earlier: NewKV | None = None,
    score_nodes: int | None = None,
    rows: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T H"], NewKV]:
    """Run the target on T nodes a row: prefill with causal ``ancestors``, verification with a tree's.

    Returns the hidden states after the final norm (float32; `logits` turns rows of
    them into logits) and each layer's new keys and values ``[B, K, T, D]``, which are
    not yet in ``caches`` (a group's ``[B_g, K, S_g, D]`` a layer, the groups' rows in order; the first
    ``lengths[b]`` slots of row ``b`` are read). Caches of fewer layers than the model has run only those.
    ``rows``: those of a single group that the B are.

    ``earlier``: keys and values of M - T nodes from earlier calls that are not in the cache
    either; they come before the T new ones in ``ancestors``. ``score_nodes``: the most nodes whose
    attention scores exist at once; each further part reads the cache once more.
    """
    config, dtype = model.config, model.dtype
    N, K, D = config.num_heads, config.num_kv_heads, config.head_dim
    (B, T), M = tokens.shape, model.shards
    precision = None if platform == "cpu" else jax.lax.Precision.HIGHEST
    cos, sin = rope_tables(config, positions)
    x = embed(model, tokens)
    new = []
    groups = (slice(0, B),) if rows is not None else tuple(spans(caches))
    for i in range(len(caches[0])):
        block, layer = model.layers[i], tuple(cache[i] for cache in caches)
        if rows is not None:
            # Always true; without it XLA's CPU backend copies every layer's rows before the first layer.
            now = jnp.where((x[:, 0, 0] < 0).astype(jnp.int32) >= 0, rows, 0)
            layer = select_rows(layer, now)
        qkv = block.self_attn.qkv_proj(block.input_layernorm(x), platform)
        qk, v = jnp.split(qkv.reshape(B, T, M, -1, D), [(N + K) // M], axis=3)
        qk = rotate(qk.reshape(B, T, N + K, D), cos, sin).reshape(B, T, M, -1, D)
        q, k = qk[:, :, :, : N // M].reshape(B, T, N, D), qk[:, :, :, N // M :]
        # What waits for the commit waits in the cache's dtype.
        # In int8 its nodes see each other as they will be seen in the cache, whatever the tree.
        as_cached = quantize if isinstance(layer[0][0], Quantized) else lambda x: x.astype(dtype)
        pair = tuple(as_cached(heads.reshape(B, T, K, D).transpose(0, 2, 1, 3)) for heads in (k, v))
        pair = optimization_barrier(pair)  # else XLA keeps the projection's float32 and converts at the end
        new.append(pair)
        if earlier is not None:
            pair = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), earlier[i], pair)
        k, v = map(dequantize, pair)

        def attend(of: slice, held: tuple[Leaf, Leaf], q: Array, ancestors: Array) -> Array:
            near = k[of], v[of]  # noqa: B023
            return tree_attention(q, *near, *held, ancestors, lengths[of], dtype, precision)

        parts = [
            by_parts(partial(attend, of, held), score_nodes, q[of], ancestors[of])
            for of, held in zip(groups, layer, strict=True)
        ]
        attended = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        x = x + block.self_attn.o_proj(attended, platform)
        x = x + block.mlp(block.post_attention_layernorm(x), platform)
    return model.norm(x), tuple(new)


def embed(model: Llama, tokens: Int[Array, "B T"]) -> Float[Array, "B T H"]:
    """The tokens' rows of the embedding table, float32.

    Of a table split by vocabulary every shard looks up its own tokens and the others' rows are zeros,
    then they are summed (Megatron-LM, arXiv 1909.08053, section 3); XLA's partitioner would otherwise
    gather the whole table on every device for a long pass.
    """
    M, table = model.shards, model.embed_tokens[...]
    if M == 1:
        return table[tokens].astype(jnp.float32)
    V, H = table.shape
    ids = tokens[None] - (jnp.arange(M) * (V // M))[:, None, None]
    own = (ids >= 0) & (ids < V // M)
    found = jax.vmap(lambda rows, ids: rows[ids])(table.reshape(M, V // M, H), jnp.where(own, ids, 0))
    return jnp.sum(jnp.where(own[..., None], found, 0), axis=0).astype(jnp.float32)


def by_parts(function: Callable[..., Array], nodes: int | None, *inputs: Array) -> Array:
    """``function`` of arrays ``[B, T, ...]``, ``nodes`` of the T at a time and one part after the other."""
    B, T = inputs[0].shape[:2]
    if nodes is None or nodes >= T:
        return function(*inputs)
    parts = -(-T // nodes)
    padding = parts * nodes - T

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, parts, nodes, *x.shape[2:]), 1, 0)

    pieces = tuple(map(split, inputs))
    one = jax.eval_shape(function, *(x[0] for x in pieces))
    # Always zero; a constant's copies for the loops of all layers would be made before the first layer.
    first = inputs[0][(0,) * inputs[0].ndim]
    zero = jnp.where((first < 0).astype(jnp.int32) >= 0, 0, 1).astype(one.dtype)

    def run(i: Array, out: Array) -> Array:
        return out.at[i].set(function(*(x[i] for x in pieces)), mode="promise_in_bounds")

    out = jax.lax.fori_loop(0, parts, run, jnp.full((parts, *one.shape), zero))
    return jnp.moveaxis(out, 0, 1).reshape(B, parts * nodes, *out.shape[3:])[:, :T]


def logits(model: Llama, hidden: Float[Array, "B T H"], platform: str) -> Float[Array, "B T V"]:
    """Float32 logits of the given rows (a separate step: only the rows that someone needs)."""
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    return matmul(hidden, head[...], platform)
