"""What speculative decoders allocate that do not count bytes: the baseline that a plan is measured against.

As EAGLE's and Medusa's published code does (see docs/memory-model.md): logits of every prompt row, and the
tree's logits once more for every root-to-leaf path. Barriers keep the compiler from removing either.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.draft.tree import Tree
from specmemo_jax.llama.model import Llama, logits


def last_of_all_logits(
    model: Llama, hidden: Float[Array, "1 C H"], count: Int[Array, ""]
) -> Float[Array, "1 V"]:
    """Logits of the last of ``count`` rows, out of those of all."""
    every = jax.lax.optimization_barrier(logits(model, hidden))
    return jax.lax.dynamic_slice_in_dim(every, count - 1, 1, axis=1)[:, 0]


def choices_by_path(
    tree: Tree,
    ancestors: Bool[Array, "B T T"],
    scores: Float[Array, "B T V"],
    max_depth: int,
    max_leaves: int,
) -> Int[Array, "B T"]:
    """The target's argmax after each node, read from ``[B, paths, depth + 1, V]`` logits gathered by path.

    ``max_leaves``: the most leaves, and so paths, that such a tree has.
    """
    B, T = tree.tokens.shape
    filled = (tree.tokens >= 0).at[:, 0].set(True)
    has_child = jnp.any(ancestors & filled[:, :, None] & ~jnp.eye(T, dtype=bool)[None], axis=1)
    _, leaves = jax.lax.top_k((filled & ~has_child).astype(jnp.int32), min(max_leaves, T))
    levels = jnp.arange(max_depth + 1)[None, None, :, None]
    above = jnp.take_along_axis(ancestors, leaves[:, :, None], axis=1)[:, :, None, :]
    on_path = above & (tree.depths[:, None, None, :] == levels)
    paths = jnp.argmax(on_path, axis=-1).astype(jnp.int32)  # the root, where a path is over
    rows = jnp.arange(B)[:, None, None]
    gathered = jax.lax.optimization_barrier(scores[rows, paths])
    chosen = jnp.argmax(gathered, axis=-1).astype(jnp.int32)
    return jnp.full((B, T), -1, jnp.int32).at[rows, paths].set(chosen)
