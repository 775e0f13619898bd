"""Llama as Flax NNX modules and one pure forward for prefill and for verification.

Layers are unrolled on purpose: a scan over layers copies weights and cache (see
docs/performance-log.md). The modules hold *packed* weights (`specmemo_jax.llama.packing`):
query, key and value projections are one matrix, and so are gate and up.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import optimization_barrier
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.llama import kv
from specmemo_jax.llama.attention import TILE, in_tiles, tree_attention
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Caches, Leaf, NewKV
from specmemo_jax.llama.layers import Linear, RMSNorm, matmul
from specmemo_jax.llama.rope import rope_tables, rotate


class Attention(nnx.Module):
    """Grouped-query attention with a fused QKV projection ``[(N + 2K) * D, H]``, shard by shard."""

    def __init__(
        self, config: LlamaConfig, dtype: jnp.dtype, shards: int, platform: str, inputs: int | None = None
    ):
        N, K, D, H = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        bias, self.heads, self.shards = config.attention_bias, (N, K, D), shards
        self.qkv_proj = Linear((N + 2 * K) * D, inputs or H, dtype, ("heads", "hidden"), bias, platform)
        self.o_proj = Linear(H, N * D, dtype, ("hidden", "heads"), bias, platform)

    def project(
        self, x: Float[Array, "B T H"], rotary: tuple[Array, Array]
    ) -> tuple[Float[Array, "B T N D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Queries, keys and values; queries and keys rotated to their positions."""
        (B, T, _), (N, K, D), M = x.shape, self.heads, self.shards
        qkv = self.qkv_proj(x)
        qk, v = jnp.split(qkv.reshape(B, T, M, -1, D), [(N + K) // M], axis=3)
        qk = rotate(qk.reshape(B, T, N + K, D), *rotary).reshape(B, T, M, -1, D)
        q, k = qk[:, :, :, : N // M], qk[:, :, :, N // M :]
        return q.reshape(B, T, N, D), k.reshape(B, T, K, D), v.reshape(B, T, K, D)


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202) with fused gate and up projections ``[2F, H]``, shard by shard."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, shards: int, platform: str):
        H, F = config.hidden_size, config.ffn_size
        self.shards = shards
        self.gate_up_proj = Linear(2 * F, H, dtype, ("ffn", "hidden"), config.mlp_bias, platform)
        self.down_proj = Linear(H, F, dtype, ("hidden", "ffn"), config.mlp_bias, platform)

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        """``down(silu(gate(x)) * up(x))``, float32."""
        B, T, _ = x.shape
        both = self.gate_up_proj(x).reshape(B, T, self.shards, 2, -1)
        return self.down_proj((jax.nn.silu(both[:, :, :, 0]) * both[:, :, :, 1]).reshape(B, T, -1))


class Block(nnx.Module):
    """One decoder layer. All layers' are the same pytree but for their weights, so that `run_block` is
    traced once for all of them.

    ``inputs``: the width of what its attention reads, where a draft head brings that itself
    (`specmemo_jax.draft.heads`); None is the normed residual.
    """

    def __init__(
        self, config: LlamaConfig, dtype: jnp.dtype, shards: int, platform: str, inputs: int | None = None
    ):
        self.platform = platform
        self.input_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps, dtype) if inputs is None else None
        )
        self.self_attn = Attention(config, dtype, shards, platform, inputs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype, shards, platform)

    @property
    def dtype(self) -> jnp.dtype:
        """The weights' dtype."""
        return self.self_attn.o_proj.weight.dtype


class Llama(nnx.Module):
    """A decoder-only Llama of any size; ``dtype`` is the weights' dtype.

    ``lm_head`` is None when the embedding table serves as the head. Fused projections hold
    ``shards`` blocks, each with its own devices' heads or ffn columns, so that splitting their rows
    over a mesh of so many devices gives every device whole heads. ``platform`` is what it is compiled for,
    as JAX spells it.
    """

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, shards: int = 1, platform: str = "cpu"):
        V, H = config.vocab_size, config.hidden_size
        self.embed_tokens = nnx.Param(jnp.zeros((V, H), dtype), axes=("vocab", "hidden"))
        self.layers = nnx.List([Block(config, dtype, shards, platform) for _ in range(config.num_layers)])
        self.norm = RMSNorm(H, config.rms_norm_eps, dtype)
        self.lm_head = (
            None if config.tied_embeddings else nnx.Param(jnp.zeros((V, H), dtype), axes=("vocab", "hidden"))
        )
        self.config, self.shards, self.platform = config, shards, platform

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
    hidden, new, _ = forward_with_taps(
        model, caches, tokens, positions, ancestors, lengths, (), earlier, score_nodes, rows
    )
    return hidden, new


def forward_with_taps(
    model: Llama,
    caches: Caches,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    ancestors: Bool[Array, "B T M"],
    lengths: Int[Array, " B"],
    taps: tuple[int, ...],
    earlier: NewKV | None = None,
    score_nodes: int | None = None,
    rows: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T H"], NewKV, Float[Array, "B T F"] | None]:
    """`forward`, and the hidden states that a draft head reads: those that enter the layers named by
    ``taps``, side by side in the weights' dtype, F = H for each; the number of layers means the last one,
    after the final norm. None without taps.
    """
    x, rotary, new = embed(model, tokens), rope_tables(model.config, positions), []
    tapped: dict[int, Array] = {}
    for i in range(len(caches[0])):
        if i in taps:
            tapped[i] = x.astype(model.dtype)
        layer = tuple(cache[i] for cache in caches)
        before = None if earlier is None else earlier[i]
        seen = Sight(layer, before, ancestors, lengths, rows)
        x, pair = run_block(model.layers[i], x, rotary, seen, score_nodes)
        new.append(pair)
    hidden = model.norm(x)
    tapped[len(new)] = hidden.astype(model.dtype)
    features = jnp.concatenate([tapped[tap] for tap in taps], axis=-1) if taps else None
    return hidden, tuple(new), features


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """What the nodes of one layer see beside themselves: each group's keys and values of the layer, those of
    ``earlier`` nodes, and of both what `forward` says.
    """

    cache: Any
    earlier: Any
    ancestors: Leaf
    lengths: Leaf
    rows: Any


@partial(jax.jit, static_argnums=4)
def run_block(
    block: Block,
    x: Float[Array, "B T H"],
    rotary: tuple[Array, Array],
    sight: Sight,
    score_nodes: int | None,
    inputs: Float[Array, "B T I"] | None = None,
) -> tuple[Float[Array, "B T H"], tuple[Leaf, Leaf]]:
    """One layer: the residual after it, and the nodes' keys and values ``[B, K, T, D]`` as a cache has them.
    ``inputs``: what attention reads in place of the normed residual.

    A function of its own under `jax.jit`, so that the layers of a program, and of programs of equal shapes,
    share one trace and one lowering; the compiler inlines it.
    """
    (B, T, _), layer, dtype = x.shape, sight.cache, block.dtype
    precision = None if block.platform == "cpu" else jax.lax.Precision.HIGHEST
    groups = (slice(0, B),) if sight.rows is not None else tuple(kv.spans(layer))
    if in_tiles(B, T, block.platform):
        row = jnp.int32(0) if sight.rows is None else sight.rows[0]
        layer = tuple(kv.row_tiles(pair, row, TILE, x) for pair in layer)
    elif sight.rows is not None:
        # Else XLA's CPU backend copies every layer's rows before the first layer.
        layer = kv.select_rows(layer, kv.ordered_after(sight.rows, x))
    if inputs is None:
        assert block.input_layernorm is not None
        inputs = block.input_layernorm(x)
    q, k, v = block.self_attn.project(inputs, rotary)
    # What waits for the commit waits in the cache's dtype.
    # In int8 its nodes see each other as they will be seen in the cache, whatever the tree.
    as_cached = kv.quantize if isinstance(sight.cache[0][0], kv.Quantized) else lambda x: x.astype(dtype)
    new = tuple(as_cached(heads.transpose(0, 2, 1, 3)) for heads in (k, v))
    new = optimization_barrier(new)  # else XLA keeps the projection's float32 and converts at the end
    near = new
    if sight.earlier is not None:
        near = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), sight.earlier, new)
    k, v = map(kv.plain, near)

    def attend(of: slice, held: tuple[Leaf, Leaf] | kv.RowTiles, q: Array, ancestors: Array) -> Array:
        return tree_attention(q, k[of], v[of], held, ancestors, sight.lengths[of], dtype, precision)

    parts = [
        by_parts(partial(attend, of, held), score_nodes, q[of], sight.ancestors[of])
        for of, held in zip(groups, layer, strict=True)
    ]
    attended = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    x = x + block.self_attn.o_proj(attended)
    return x + block.mlp(block.post_attention_layernorm(x)), new


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
    # A constant's copies for the loops of all layers would be made before the first layer.
    zero = kv.ordered_after(jnp.zeros((), one.dtype), inputs[0])

    def run(i: Array, out: Array) -> Array:
        return out.at[i].set(function(*(x[i] for x in pieces)), mode="promise_in_bounds")

    out = jax.lax.fori_loop(0, parts, run, jnp.full((parts, *one.shape), zero))
    return jnp.moveaxis(out, 0, 1).reshape(B, parts * nodes, *out.shape[3:])[:, :T]


@jax.named_scope("logits")
def logits(model: Llama, hidden: Float[Array, "B T H"]) -> Float[Array, "B T V"]:
    """Float32 logits of the given rows (a separate step: only the rows that someone needs)."""
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    return matmul(hidden, head[...], model.platform)
