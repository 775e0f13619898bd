"""A token tree from a language model: level by level the most likely continuations.

Each level is one pass of the draft over its ``branches`` best nodes by joint probability; of all
candidates met on the way the most probable become the tree (EAGLE-2, arXiv 2406.16858, section 4).
The draft's cache is only read: nodes' keys and values live in the passes' temporaries.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.draft.tree import Tree
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.buffers import Cost
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Caches, NewKV
from specmemo_jax.llama.model import Llama, forward, logits


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """``num_nodes`` T (root included) of at most ``depth`` levels, ``branches`` a level expanded.

    One branch is a chain. Raises ConfigError where the levels cannot hold so many nodes.
    """

    num_nodes: int
    depth: int
    branches: int = 1

    def __post_init__(self) -> None:
        if self.num_nodes < 2 or self.branches < 1 or self.depth < 1:
            raise ConfigError(
                f"a drafted tree needs 2 nodes, 1 level and 1 branch at least, "
                f"found num_nodes={self.num_nodes}, depth={self.depth}, branches={self.branches}"
            )
        most = 1 + self.branches + (self.depth - 1) * self.branches**2
        if self.num_nodes > most:
            raise ConfigError(
                f"{self.depth} levels of {self.branches} branches hold at most {most} nodes, "
                f"{self.num_nodes} were asked for; more levels or branches would work"
            )

    @classmethod
    def of(cls, num_nodes: int, branches: int = 1, depth: int | None = None) -> "TreeShape":
        """A chain, or for more branches a tree about as deep as they can fill."""
        if depth is None:
            depth = num_nodes - 1 if branches == 1 else -(-num_nodes // branches)
        return cls(num_nodes, depth, branches)

    def limited(self, num_nodes: int) -> "TreeShape":
        """As wide, with fewer nodes on as few levels as hold them in the same proportion."""
        branches = min(self.branches, num_nodes - 1)
        depth = max(1, -(-self.depth * (num_nodes - 1) // (self.num_nodes - 1)))
        while num_nodes > 1 + branches + (depth - 1) * branches**2:
            depth += 1
        return TreeShape(num_nodes, depth, branches)


class BeamDrafter(Drafter):
    """A drafter whose trees are of one `TreeShape` and always filled."""

    shape: TreeShape

    @property
    def num_nodes(self) -> int:
        """T, root included."""
        return self.shape.num_nodes

    @property
    def max_depth(self) -> int:
        """Levels that the draft looks ahead."""
        return self.shape.depth

    @property
    def is_chain(self) -> bool:
        """One branch."""
        return self.shape.branches == 1

    @property
    def max_leaves(self) -> int:
        """Every node but the root and the parents that the levels below the first need at least."""
        k, nodes = self.shape.branches, self.num_nodes - 1
        return max(1, nodes - -(-max(0, nodes - k) // k))

    @property
    def tree_sizes(self) -> tuple[int, ...]:
        """A half and the whole."""
        half = self.num_nodes // 2
        return (half, self.num_nodes) if half >= 2 else (self.num_nodes,)


def beam_cost(
    config: LlamaConfig, layers: int, itemsize: int, shape: TreeShape, batch: int, length: int
) -> Cost:
    """What `beam_draft` costs over the first ``layers`` of a model with ``length`` tokens in its cache."""
    H, D = config.hidden_size, config.head_dim
    layer = H * D * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * H * config.ffn_size
    weights = layers * layer + config.vocab_size * H
    rows = batch * (2 + (shape.depth - 1) * shape.branches)  # two nodes in the first pass: about what waits
    attention = 4 * layers * config.num_heads * D * length * rows
    cache = 2 * layers * config.num_kv_heads * D * length * batch
    return Cost(
        layers=shape.depth * layers,
        flops=2.0 * weights * rows + attention,
        bytes=float(shape.depth * itemsize * (weights + cache)),
    )


@dataclasses.dataclass(frozen=True)
class Level:
    """Candidates of one level: ``tokens``, joint log probabilities, and parents among all candidates."""

    tokens: Int[Array, "B M"]
    joint: Float[Array, "B M"]
    parents: Int[Array, "B M"]


def beam_draft(
    model: Llama,
    caches: Caches,
    known: Int[Array, " B"],
    unread: Int[Array, "B U"],
    num_unread: Int[Array, " B"],
    pending: Int[Array, " B"],
    shape: TreeShape,
    vocab_size: int,
) -> tuple[Tree, NewKV]:
    """A tree rooted in ``pending``, from a draft ``model`` whose ``caches`` hold ``known`` positions a row.

    ``unread[b, :num_unread[b]]`` are committed tokens after those, which the first pass reads
    together with ``pending``; their keys and values ``[B, K, U + 1, D]`` come back with the tree.
    Caches of fewer layers than the model's run only those. Tokens from ``vocab_size`` on are
    never proposed.
    """
    B, U = unread.shape
    slots = jnp.arange(U + 1)[None, :]
    tokens = jnp.pad(unread, ((0, 0), (0, 1)))
    tokens = jnp.where(slots == num_unread[:, None], pending[:, None], tokens)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((1, U + 1, U + 1), bool)), (B, U + 1, U + 1))
    hidden, read = forward(model, caches, tokens, known[:, None] + slots, causal, known)

    def expand(
        tokens: Array, parents: Array, positions: Array, ancestors: Array, earlier: NewKV
    ) -> tuple[Array, NewKV]:
        return forward(model, caches, tokens, positions, ancestors, known, earlier=earlier)

    passes = Passes(expand, lambda hidden: logits(model, hidden)[:, :, :vocab_size])
    return grow_tree(passes, hidden, read, known, num_unread, pending, shape), read


@dataclasses.dataclass(frozen=True)
class Passes:
    """What a draft does of its own while a tree grows.

    ``expand``: a pass over nodes ``[B, k]`` with their parents' outputs ``[B, k, H]``, their positions, which
    nodes they see (`forward`), and earlier nodes' keys and values; gives outputs ``[B, k, H]`` and new keys
    and values. ``score``: logits ``[B, k, Vd]`` of outputs. ``ids``: the target's ids of a draft's own.
    """

    expand: Callable[[Array, Array, Array, Array, NewKV], tuple[Array, NewKV]]
    score: Callable[[Array], Array]
    ids: Callable[[Array], Array] = lambda ids: ids


def grow_tree(
    passes: Passes,
    hidden: Float[Array, "B M H"],
    read: NewKV,
    known: Int[Array, " B"],
    last: Int[Array, " B"],
    pending: Int[Array, " B"],
    shape: TreeShape,
) -> Tree:
    """A tree rooted in ``pending``, after a first pass over M nodes from position ``known[b]`` on that gave
    ``hidden``; what it gave at node ``last[b]`` says what follows ``pending``.
    """
    B, M, _ = hidden.shape
    k, slots = shape.branches, jnp.arange(M)[None, :]
    root = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    children, log_p = _likeliest(passes.score(root), k)
    children = passes.ids(children)
    levels = [Level(children[:, 0], log_p[:, 0], jnp.full((B, k), -1, jnp.int32))]
    beam, joint = children[:, 0], log_p[:, 0]
    outputs = jnp.broadcast_to(root, (B, k, root.shape[2]))
    places = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[None, :], (B, k))
    visible = jnp.broadcast_to((slots <= last[:, None])[:, None, :], (B, k, M))
    nodes, first_place = read, k
    for depth in range(1, shape.depth):
        positions = jnp.broadcast_to((known + last + depth)[:, None], (B, k))
        ancestors = _with_self(visible)
        hidden, new = passes.expand(beam, outputs, positions, ancestors, nodes)
        nodes = jax.tree.map(lambda old, more: jnp.concatenate([old, more], axis=2), nodes, new)
        children, log_p = _likeliest(passes.score(hidden), k)
        joints = (joint[:, :, None] + log_p).reshape(B, k * k)
        children = passes.ids(children).reshape(B, k * k)
        levels.append(Level(children, joints, jnp.repeat(places, k, axis=1)))
        joint, best = jax.lax.top_k(joints, k)
        beam = jnp.take_along_axis(children, best, axis=1)
        outputs = jnp.take_along_axis(hidden, (best // k)[:, :, None], axis=1)
        places = first_place + best.astype(jnp.int32)
        visible = jnp.take_along_axis(ancestors, (best // k)[:, :, None], axis=1)
        first_place += k * k
    return _best_nodes(pending, levels, shape)


def _with_self(visible: Bool[Array, "B k M"]) -> Bool[Array, "B k N"]:
    """Earlier nodes that each of a level's nodes sees, and itself among the level's."""
    B, k, _ = visible.shape
    return jnp.concatenate([visible, jnp.broadcast_to(jnp.eye(k, dtype=bool)[None], (B, k, k))], axis=2)


def _likeliest(scores: Float[Array, "B M V"], k: int) -> tuple[Int[Array, "B M k"], Float[Array, "B M k"]]:
    """The k likeliest next tokens and their log probabilities."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)  # or a child could outrank its parent
    total = jnp.maximum(jax.nn.logsumexp(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    if k == 1:
        best = jnp.argmax(scores, axis=-1, keepdims=True)
        return best.astype(jnp.int32), jnp.take_along_axis(scores, best, axis=-1) - total
    values, ids = jax.lax.top_k(scores, k)
    return ids.astype(jnp.int32), values - total


def _best_nodes(pending: Int[Array, " B"], levels: list[Level], shape: TreeShape) -> Tree:
    """The T - 1 most probable candidates under the root, in level order.

    A child is never more probable than its parent and comes after it, so what is chosen hangs together.
    """
    B, T = pending.shape[0], shape.num_nodes
    tokens, joint, parents = (
        jnp.concatenate([getattr(level, name) for level in levels], axis=1)
        for name in ("tokens", "joint", "parents")
    )
    depths = jnp.concatenate(
        [jnp.full((B, level.tokens.shape[1]), d, jnp.int32) for d, level in enumerate(levels, 1)], axis=1
    )
    _, chosen = jax.lax.top_k(joint, T - 1)
    chosen = jnp.sort(chosen, axis=1)
    slot_of = jnp.zeros(tokens.shape, jnp.int32)
    slot_of = slot_of.at[jnp.arange(B)[:, None], chosen].set(jnp.arange(1, T, dtype=jnp.int32)[None, :])
    parent = jnp.take_along_axis(parents, chosen, axis=1)
    parent_slot = jnp.take_along_axis(slot_of, jnp.maximum(parent, 0), axis=1)
    zero = jnp.zeros((B, 1), jnp.int32)
    return Tree(
        tokens=jnp.concatenate([pending[:, None], jnp.take_along_axis(tokens, chosen, axis=1)], axis=1),
        parents=jnp.concatenate([zero, jnp.where(parent < 0, 0, parent_slot)], axis=1),
        depths=jnp.concatenate([zero, jnp.take_along_axis(depths, chosen, axis=1)], axis=1),
    )
