"""Which candidates the target agrees with."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.decode.sampling import History, Sampling, choose, remember
from specmemo_jax.draft.tree import Tree
from specmemo_jax.llama.kv import Leaf


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


def accept_sampled(
    tree: Tree,
    logits_at: Callable[[Int[Array, " B"]], Float[Array, "B V"]],
    sampling: Sampling,
    history: History,
    stop_ids: Int[Array, "B E"],
    lengths: Int[Array, " B"],
    live: Bool[Array, " B"],
    max_depth: int,
) -> tuple[Accepted, History]:
    """Walk from the root to the child that carries the target's own draw, until there is none.

    At each node the target draws its next token (`choose`); if a child carries it the walk goes
    there, else the token is the bonus. Every emitted token is so a draw from the target's own
    distribution, whatever the tree proposes, and costs are paid only at the nodes visited.
    ``logits_at`` gives the logits of one node a row.
    """
    B, T = tree.tokens.shape
    P = max_depth + 1
    nodes = jnp.arange(T)[None, :]

    def step(carry: Walk) -> Walk:
        token = choose(logits_at(carry.node), sampling, carry.history, stop_ids, lengths + carry.depth + 1)
        child = (tree.parents == carry.node[:, None]) & (tree.tokens == token[:, None]) & (nodes > 0)
        column = jnp.where(carry.live, carry.depth, P)
        rows = jnp.arange(B)
        return Walk(
            depth=carry.depth + 1,
            node=jnp.argmax(child, axis=1).astype(jnp.int32),
            live=carry.live & jnp.any(child, axis=1),
            path=carry.path.at[rows, column].set(carry.node, mode="drop"),
            emitted=carry.emitted.at[rows, column].set(token, mode="drop"),
            counts=carry.counts + carry.live.astype(jnp.int32),
            history=remember(carry.history, token, carry.live),
        )

    zeros = jnp.zeros((B,), jnp.int32)
    start = Walk(
        depth=jnp.int32(0),
        node=zeros,
        live=live,
        path=jnp.zeros((B, P), jnp.int32),
        emitted=jnp.zeros((B, P), jnp.int32),
        counts=zeros,
        history=history,
    )
    end = jax.lax.while_loop(lambda carry: (carry.depth < P) & jnp.any(carry.live), step, start)
    return Accepted(path=end.path, emitted=end.emitted, counts=end.counts), end.history


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walk:
    """How far `accept_sampled` has come; ``live`` rows still have a node to leave."""

    depth: Leaf
    node: Leaf
    live: Leaf
    path: Leaf
    emitted: Leaf
    counts: Leaf
    history: History
