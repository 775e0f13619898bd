"""Which candidates the target agrees with."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specmemo_jax.speculate.tree import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accepted:
    """The accepted path of each row.

    ``path[b, d]`` is the node at depth ``d`` (valid for ``d < counts[b]``), ``emitted[b, d]``
    the target's own token after it, and ``counts[b]`` how many tokens the step emits,
    the bonus token included.
    """

    path: Int[Array, "B P"]
    emitted: Int[Array, "B P"]
    counts: Int[Array, " B"]


def accept_greedy(
    tree: Tree, ancestors: Bool[Array, "B T T"], choices: Int[Array, "B T"], max_depth: int
) -> Accepted:
    """Walk from the root to the child that the target chose, until there is none.

    ``choices[b, i]`` is the target's argmax after node ``i``. Done without a loop: a node
    is accepted when it and all its ancestors are what their parents' choices say, and
    since siblings differ there is exactly one deepest such node. (Greedy tree
    verification: SpecInfer, arXiv 2305.09781, section 4.)
    """
    chosen = tree.tokens == jnp.take_along_axis(choices, tree.parents, axis=1)
    chosen = chosen.at[:, 0].set(True)
    accepted = jnp.all(chosen[:, None, :] | ~ancestors, axis=-1)
    last = jnp.argmax(jnp.where(accepted, tree.depths, -1), axis=-1)
    on_path = jnp.take_along_axis(ancestors, last[:, None, None], axis=1)[:, 0]
    levels = jnp.arange(max_depth + 1)[None, :, None]
    path = jnp.argmax(on_path[:, None, :] & (tree.depths[:, None, :] == levels), axis=-1).astype(jnp.int32)
    counts = jnp.take_along_axis(tree.depths, last[:, None], axis=1)[:, 0] + 1
    return Accepted(path=path, emitted=jnp.take_along_axis(choices, path, axis=1), counts=counts)
