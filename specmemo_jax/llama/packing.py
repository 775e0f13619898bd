"""Canonical tensors into the engine's model, one tensor at a time, and the result as one object.

On disk a weight has its Hugging Face name and shape. In memory projections that read
the same input are one matrix, so that a layer takes four matrix products and not seven.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from specmemo_jax.devices.quiet import live_devices
from specmemo_jax.devices.table import Device
from specmemo_jax.errors import WeightsError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.model import Llama

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FUSED_INTO = {part: whole for whole, parts in FUSED.items() for part in parts}


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A Llama ready to run: flat weight arrays and how to put them back together.

    Programs take ``leaves`` as an argument and call `merge` while they are traced; a
    flat tuple dispatches a hundred times faster than an NNX object.
    """

    config: LlamaConfig
    dtype: jnp.dtype
    platform: str
    leaves: tuple[Any, ...]
    graph: Any
    tree: Any

    def merge(self, leaves: Sequence[Any]) -> Llama:
        """The NNX model over ``leaves``."""
        return merge(self.graph, self.tree, leaves)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(leaf.nbytes for leaf in self.leaves)


def merge(graph: Any, tree: Any, leaves: Sequence[Any]) -> Llama:
    """The NNX model of `abstract_model`'s ``graph`` and ``tree`` over ``leaves``."""
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def packed_name(name: str) -> tuple[str, int]:
    """Where a canonical tensor goes: the packed parameter's name and its place among the fused parts."""
    if name in ("embed_tokens.weight", "lm_head.weight"):
        return name.removesuffix(".weight"), 0
    *scope, module, kind = name.split(".")
    whole = _FUSED_INTO.get(module)
    if whole is None:
        return name, 0
    return ".".join([*scope, whole, kind]), FUSED[whole].index(module)


@functools.lru_cache(16)
def abstract_model(
    config: LlamaConfig, dtype: jnp.dtype, shards: int = 1, platform: str = "cpu"
) -> tuple[Any, Any, dict[str, jax.ShapeDtypeStruct]]:
    """Graph, tree and packed parameter shapes (in leaf order) of a model, without allocating it."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, jnp.dtype(dtype), shards, platform)))
    paths, tree = jax.tree_util.tree_flatten_with_path(state)
    names = [
        ".".join(str(getattr(key, "key", key)) for key in path if hasattr(key, "key")) for path, _ in paths
    ]
    return graph, tree, {name: leaf for name, (_, leaf) in zip(names, paths, strict=True)}


def packed_axes(config: LlamaConfig, shards: int = 1) -> tuple[tuple[str, ...], ...]:
    """Logical axes of every packed parameter, in leaf order."""
    state = nnx.eval_shape(lambda: nnx.state(Llama(config, jnp.dtype("float32"), shards)))
    params = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return tuple(param.get_metadata("axes") for param in params)


def pack(
    config: LlamaConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: jnp.dtype,
    device: Device | None = None,
    shards: int = 1,
) -> Target:
    """Cast and pack a stream of canonical ``(name, array)`` pairs onto ``device``.

    ``shards``: blocks of the fused projections (`Llama`).

    Holds no more than the packed weights, one fused matrix and its parts at any time.
    Raises WeightsError for a tensor that is unknown, repeated, missing or of another shape.
    """
    dtype = jnp.dtype(dtype)
    chosen: Device = device or live_devices()[0]
    graph, tree, shapes = abstract_model(config, dtype, shards, chosen.platform)
    expected = config.tensor_shapes()
    parts: dict[str, dict[int, np.ndarray]] = {}
    packed: dict[str, jax.Array] = {}
    seen: set[str] = set()
    for name, array in tensors:
        if name not in expected:
            raise WeightsError(f"unexpected tensor {name!r} for this config")
        if name in seen:
            raise WeightsError(f"tensor {name!r} appears twice")
        if tuple(array.shape) != expected[name]:
            raise WeightsError(
                f"tensor {name!r} has shape {tuple(array.shape)}, the config wants {expected[name]}"
            )
        seen.add(name)
        key, place = packed_name(name)
        parts.setdefault(key, {})[place] = np.asarray(array).astype(dtype, copy=False)
        if sum(part.shape[0] for part in parts[key].values()) == shapes[key].shape[0]:
            ready = parts.pop(key)
            host = ready[0] if len(ready) == 1 else _fuse([ready[i] for i in sorted(ready)], shards)
            packed[key] = jax.device_put(host, chosen, may_alias=False)
    missing = sorted(expected.keys() - seen)
    if missing:
        raise WeightsError(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
    leaves = tuple(packed[name] for name in shapes)
    return Target(config, dtype, chosen.platform, leaves, graph, tree)


def abstract_target(config: LlamaConfig, dtype: jnp.dtype, platform: str, shards: int = 1) -> Target:
    """A `Target` of shapes alone, to lower programs with; its leaves are ShapeDtypeStructs."""
    graph, tree, shapes = abstract_model(config, dtype, shards, platform)
    leaves = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in shapes.values())
    return Target(config, jnp.dtype(dtype), platform, leaves, graph, tree)


def _fuse(parts: Sequence[np.ndarray], shards: int) -> np.ndarray:
    """Parts on top of each other, shard by shard."""
    blocks = [np.split(part, shards) for part in parts]
    return np.concatenate([block[shard] for shard in range(shards) for block in blocks])
