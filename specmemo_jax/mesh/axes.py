"""Tensor parallelism as one table: every logical axis of a parameter or buffer to a mesh axis.

Query, key and value heads, the ffn and the vocabulary are split; hidden states are whole on every
device (Megatron-LM, arXiv 1909.08053, section 3). XLA's partitioner places the collectives: one sum
after attention and one after the MLP.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.config import LlamaConfig

MODEL = "model"
RULES = {
    "vocab": MODEL,
    "heads": MODEL,
    "kv_heads": MODEL,
    "ffn": MODEL,
    "hidden": None,
    "batch": None,
    "context": None,
    "head_dim": None,
}


def model_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh of one axis over ``devices``."""
    return Mesh(np.asarray(devices), (MODEL,))


def sharding(mesh: Mesh, axes: Sequence[str] = ()) -> NamedSharding:
    """Where an array with these logical ``axes`` lies; without axes, whole on every device."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in axes)))


def placed(tree: Any, where: Any) -> Any:
    """Shapes of ``tree`` with the shardings of ``where``, a tree of the same structure or one for all."""
    if isinstance(where, NamedSharding):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)


def check_shards(config: LlamaConfig, shards: int) -> None:
    """Raise ConfigError unless ``shards`` devices can split the model evenly."""
    if shards < 1:
        raise ConfigError(f"a mesh needs at least 1 device, found {shards}")
    sizes = {
        "KV heads": config.num_kv_heads,
        "query heads": config.num_heads,
        "ffn columns": config.ffn_size,
        "vocabulary rows": config.vocab_size,
    }
    for name, size in sizes.items():
        if size % shards:
            works = [n for n in (1, 2, 4, 8, 16) if all(s % n == 0 for s in sizes.values())]
            raise ConfigError(
                f"a mesh of {shards} devices cannot split {size} {name} evenly; "
                f"{', '.join(map(str, works))} devices would work"
            )
