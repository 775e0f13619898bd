"""EAGLE's and Medusa's weights as Flax NNX modules, and from named tensors to a program's arguments."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from specmemo_jax.draft.head_config import HeadConfig
from specmemo_jax.llama import model as llama
from specmemo_jax.llama.layers import Linear, RMSNorm, matmul
from specmemo_jax.llama.packing import Target


class EagleHead(nnx.Module):
    """One decoder layer over a token's embedding and features, by `HeadConfig`'s names.

    ``rows``: ``[Vd, H]``, which score the tokens that it can propose; None where the target's head does.
    ``ids``: ``[Vd]``, those tokens; None for all.
    """

    def __init__(self, config: HeadConfig, dtype: jnp.dtype, platform: str):
        layer, deep = config.layer, config.kind == "eagle3"
        H, Vd = layer.hidden_size, config.num_draft_tokens
        inner, eps = (2 if deep else 1) * H, layer.rms_norm_eps
        width = config.tensor_shapes()["fc.weight"][1]
        self.fc = Linear(H, width, dtype, ("hidden", "features"), config.fc_bias, platform)
        self.hidden_norm = RMSNorm(H, eps, dtype) if deep else None
        self.input_layernorm = RMSNorm(H, eps, dtype) if deep else None
        self.layer = llama.Block(layer, dtype, 1, platform, inner)
        self.norm = RMSNorm(H, eps, dtype) if deep else None
        own = config.own_lm_head or config.draft_vocab_size is not None
        self.rows = nnx.Param(jnp.zeros((Vd, H), dtype)) if own else None
        reduced = config.draft_vocab_size is not None
        self.ids = nnx.Param(jnp.zeros((Vd,), jnp.int32)) if reduced else None
        self.config = config

    def features(self, embedded: Float[Array, "B T H"], tapped: Array) -> tuple[Array, Array]:
        """From the target's hidden states ``[B, T, F]`` to the residual and to what attention reads of it."""
        if self.config.kind == "eagle3":
            return self.again(embedded, self.fc(tapped))
        return self.again(embedded, tapped)

    def again(self, embedded: Float[Array, "B T H"], state: Float[Array, "B T H"]) -> tuple[Array, Array]:
        """The same from the head's own output for the slot before."""
        if self.hidden_norm is None or self.input_layernorm is None:
            x = self.fc(jnp.concatenate([embedded, state.astype(jnp.float32)], axis=-1))
            return x, x
        return state, jnp.concatenate([self.input_layernorm(embedded), self.hidden_norm(state)], axis=-1)

    def logits(self, target: llama.Llama, out: Float[Array, "B T H"]) -> Float[Array, "B T Vd"]:
        """Of the tokens that it can propose."""
        return _scores(self.rows, target, out if self.norm is None else self.norm(out))


class MedusaHead(nnx.Module):
    """A residual block a depth over the target's last hidden state; ``rows`` and ``ids`` as `EagleHead`'s,
    and ``each_rows`` where the head brings rows for every depth.
    """

    def __init__(self, config: HeadConfig, dtype: jnp.dtype, platform: str):
        H, Vd = config.layer.hidden_size, config.num_draft_tokens
        reduced = config.draft_vocab_size is not None
        # One matrix, or XLA's GPU backend would put the heads' own side by side at every step.
        self.blocks = Linear(config.num_heads * H, H, dtype, ("hidden", "features"), True, platform)
        each = config.num_heads if config.own_lm_head else 0
        self.each_rows = nnx.List([nnx.Param(jnp.zeros((Vd, H), dtype)) for _ in range(each)])
        self.rows = nnx.Param(jnp.zeros((Vd, H), dtype)) if reduced and not each else None
        self.ids = nnx.Param(jnp.zeros((Vd,), jnp.int32)) if reduced else None
        self.config = config

    def scores(
        self, target: llama.Llama, depths: int, tapped: Float[Array, "B 1 H"]
    ) -> tuple[Float[Array, "B n Vd"], ...]:
        """Logits of the first ``depths`` heads, in order; head i's are of the token i + 1 places after the
        next one. Side by side in one array where the same rows score for all, so that they are read once;
        else one array a head.
        """
        x = tapped.astype(jnp.float32)
        B, _, H = x.shape
        x = x + jax.nn.silu(self.blocks(x).reshape(B, -1, H)[:, :depths])
        if not len(self.each_rows):
            return (_scores(self.rows, target, x),)
        return tuple(_scores(self.each_rows[i], target, x[:, i : i + 1]) for i in range(depths))


def _scores(rows: Any, target: llama.Llama, x: Float[Array, "B T H"]) -> Array:
    if rows is None:
        return llama.logits(target, x)
    with jax.named_scope("logits"):
        return matmul(x, rows[...], target.platform)


def to_target_ids(head: Any, ids: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """The target's ids of a head's own."""
    return ids if head.ids is None else head.ids[...][ids]


def make_head(config: HeadConfig, dtype: jnp.dtype, platform: str) -> Any:
    """The module of a kind."""
    kind = MedusaHead if config.kind == "medusa" else EagleHead
    return kind(config, jnp.dtype(dtype), platform)


@dataclasses.dataclass(frozen=True)
class AbstractHead:
    """A head's graph, the tree of its leaves, and their packed names with shapes, nothing allocated."""

    graph: Any
    tree: Any
    shapes: dict[str, jax.ShapeDtypeStruct]

    def merge(self, leaves: Any) -> Any:
        """The module over ``leaves``."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


@functools.lru_cache(16)
def abstract_head(config: HeadConfig, dtype: jnp.dtype, platform: str) -> AbstractHead:
    """Of a head with weights of ``dtype`` on ``platform``."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make_head(config, dtype, platform)))
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    shapes = {
        ".".join(str(getattr(key, "key", key)) for key in path if hasattr(key, "key")): leaf
        for path, leaf in paths
    }
    return AbstractHead(graph, tree, shapes)


def pack_head(
    config: HeadConfig, tensors: Mapping[str, np.ndarray], target: Target, device: Any = None
) -> tuple[jax.Array, ...]:
    """A head's leaves in the target's dtype on its device, from tensors that `HeadConfig` names."""
    found = abstract_head(config, target.dtype, target.platform).shapes
    place = next(iter(target.leaves[0].devices())) if device is None else device
    return tuple(_leaf(name, leaf, config, tensors, target, place) for name, leaf in found.items())


def _leaf(
    name: str, leaf: Any, config: HeadConfig, tensors: Mapping[str, np.ndarray], target: Target, place: Any
) -> jax.Array:
    def put(array: np.ndarray) -> jax.Array:
        assert array.shape == leaf.shape, (name, array.shape, leaf.shape)
        return jax.device_put(np.asarray(array).astype(leaf.dtype), place, may_alias=False)

    if name == "ids":
        return put(target_ids(tensors["d2t"]))
    if name == "rows" and not config.own_lm_head:
        model = target.merge(target.leaves)
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        return head[...][jnp.asarray(target_ids(tensors["d2t"]))]
    if name == "rows":
        return put(tensors["lm_head.weight"])
    *scope, kind = name.split(".")
    if config.kind == "medusa":
        if scope == ["each_rows"]:
            return put(tensors[f"{kind}.1.weight"])
        return put(np.concatenate([tensors[f"{i}.0.linear.{kind}"] for i in range(config.num_heads)]))
    layer = "layers.0" if config.kind == "eagle" else "midlayer"
    if name in ("fc.weight", "fc.bias", "norm.weight"):
        return put(tensors[name])
    inner = ".".join(scope).removeprefix("layer.")
    fused = {
        "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    }
    if inner in fused:
        room = inner.split(".")[0]
        return put(np.concatenate([tensors[f"{layer}.{room}.{part}.{kind}"] for part in fused[inner]]))
    return put(tensors[f"{layer}.{inner}.{kind}"])


def target_ids(d2t: np.ndarray) -> np.ndarray:
    """The target's ids of a draft vocabulary, from their distances to the draft's."""
    return (np.asarray(d2t, np.int64) + np.arange(len(d2t))).astype(np.int32)
