"""Token trees as data: only the number of nodes T is static."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """T candidate nodes a row. Node 0 is the root, the row's pending token.

    ``parents[b, i] < i`` for every other node (``parents[b, 0] = 0``), ``depths`` count
    from the root, and siblings carry different tokens. A node that was not filled
    carries `NO_TOKEN`; it is never accepted, and neither is anything below it.
    """

    tokens: Int[Array, "B T"]
    parents: Int[Array, "B T"]
    depths: Int[Array, "B T"]


def root_only(pending: Int[Array, " B"]) -> Tree:
    """The tree of plain decoding: T = 1."""
    zeros = jnp.zeros((pending.shape[0], 1), jnp.int32)
    return Tree(tokens=pending[:, None], parents=zeros, depths=zeros)


def ancestor_mask(parents: Int[Array, "B T"], max_depth: int) -> Bool[Array, "B T T"]:
    """``mask[b, i, j]``: node ``j`` is node ``i`` or above it.

    Pointer doubling: after k rounds a node knows its ancestors up to ``2**k`` levels up.
    """
    B, T = parents.shape
    mask = jnp.broadcast_to(jnp.eye(T, dtype=bool), (B, T, T))
    for _ in range(max(max_depth, 1).bit_length()):
        mask = mask | jnp.take_along_axis(mask, parents[:, :, None], axis=1)
        parents = jnp.take_along_axis(parents, parents, axis=1)
    return mask
