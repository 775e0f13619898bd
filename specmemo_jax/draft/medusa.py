"""Medusa: heads over the target's last hidden state, each of which guesses the token at one depth alone
(arXiv 2401.10774).

No head knows what another one guessed, so that a tree is picked from the heads' likeliest tokens by their
ranks, and its form is a constant: the one that the chances of acceptance by depth and rank make best.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specmemo_jax.draft.head_config import HeadConfig
from specmemo_jax.draft.head_drafter import HeadDrafter
from specmemo_jax.draft.heads import MedusaHead, to_target_ids
from specmemo_jax.draft.live_sets import medusa_live_sets
from specmemo_jax.draft.protocol import State, View
from specmemo_jax.draft.static_tree import Chances, best_tree
from specmemo_jax.draft.tree import Tree
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.buffers import Buffer, Cost
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Groups
from specmemo_jax.llama.live_sets import ForwardShape, LiveSet
from specmemo_jax.llama.packing import Target

DEPTHS, RANKS = 8, 16


def _usual_chances() -> Chances:
    """About what the published heads reach: the first one's likeliest token comes six times in ten, one of
    its five likeliest eight times. The rest is a guess: each further head's comes four fifths as often as the
    last one's, and less likely ones come less and less often, the second half as often as the first at most.
    """
    rows = []
    for depth in range(DEPTHS):
        first = 0.6 * 0.8**depth
        second = min(first / 2, (1 - first) / 4)
        rows.append((first, *(second * rank**-1.2 for rank in range(1, RANKS))))
    return tuple(rows)


USUAL_CHANCES = _usual_chances()


@dataclasses.dataclass(frozen=True)
class StaticTree:
    """A tree's form: of each node, root included, its parent, its depth and its rank among its siblings."""

    parents: tuple[int, ...]
    depths: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, parents: tuple[int, ...]) -> "StaticTree":
        """From parents that come before their children, siblings by rank."""
        depths, ranks, children = [0], [0], [0] * len(parents)
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
            ranks.append(children[parent])
            children[parent] += 1
        return cls(parents, tuple(depths), tuple(ranks))


@functools.lru_cache(64)
def _best(chances: Chances, nodes: int, depth: int) -> StaticTree:
    return StaticTree.of(best_tree(chances, nodes, depth))


@dataclasses.dataclass(frozen=True)
class MedusaDrafter(HeadDrafter):
    """Medusa's heads for a target.

    Args:
        config: the heads'.
        load: gives their packed weights for a target; called once, after the plan was made.
        num_nodes: T of the tree it proposes, which is always filled.
        dtype: of its weights and the feature that it keeps; the target's.
        name: what tables and messages call it.
        platform: what it runs on, as JAX spells it.
        chances: how often the token of a rank is accepted at a depth, given that its parent was
            (`best_tree`); the tree is made for them.
        depth: levels at most, where that is less than there are heads.

    Raises ConfigError where heads, ranks and levels cannot hold so many nodes.
    """

    config: HeadConfig
    load: Callable[[Target], Any] = dataclasses.field(compare=False)
    num_nodes: int
    dtype: str
    name: str = "medusa"
    platform: str = "cpu"
    chances: Chances = USUAL_CHANCES
    depth: int | None = None

    def __post_init__(self) -> None:
        if self.config.kind != "medusa":
            raise ConfigError(f"a Medusa drafter needs heads of that kind, found {self.config.kind!r}")
        if self.num_nodes < 2:
            raise ConfigError(f"a drafted tree needs 2 nodes at least, found num_nodes={self.num_nodes}")
        if not self.chances or len({len(row) for row in self.chances}) > 1:
            raise ConfigError("chances need a row a depth, all of the same number of ranks")
        if (most := len(self.tree.parents)) < self.num_nodes:
            raise ConfigError(
                f"{self._levels} levels of {len(self.chances[0])} ranks, of {self.config.num_draft_tokens} "
                f"tokens, hold at most {most} nodes of any chance, {self.num_nodes} were asked for; fewer "
                "nodes, or chances of more ranks, would work"
            )

    @property
    def _levels(self) -> int:
        levels = min(self.config.num_heads, len(self.chances))
        return levels if self.depth is None else min(levels, self.depth)

    @property
    def tree(self) -> StaticTree:
        """The form of all its trees."""
        known = tuple(row[: self.config.num_draft_tokens] for row in self.chances)
        return _best(known, self.num_nodes, self._levels)

    @property
    def max_depth(self) -> int:
        """Of the tree, which may be less than there are heads; the tokens of so many are scored."""
        return max(self.tree.depths)

    @property
    def is_chain(self) -> bool:
        """One node a level."""
        return self.max_depth == self.num_nodes - 1

    @property
    def max_leaves(self) -> int:
        """The tree's leaves."""
        return self.num_nodes - len(set(self.tree.parents))

    @property
    def branches(self) -> int:
        """k, tokens that are taken of a head at most."""
        return 1 + max(self.tree.ranks)

    @property
    def tree_sizes(self) -> tuple[int, ...]:
        """A half and the whole."""
        half = self.num_nodes // 2
        return (half, self.num_nodes) if half >= 2 else (self.num_nodes,)

    def limited(self, num_nodes: int) -> "MedusaDrafter":
        """The same weights and state, the best smaller tree that is no deeper."""
        return dataclasses.replace(self, num_nodes=num_nodes, depth=self.max_depth)

    def work(self, config: LlamaConfig, itemsize: int, batch: int, length: int) -> Cost:
        """The heads' blocks, and the rows that score for all of them, read once unless each has its own."""
        H, n = self.config.layer.hidden_size, self.max_depth
        blocks, scorers = self.config.num_heads * H * H, self.config.num_draft_tokens * H
        read = blocks + scorers * (n if self.config.own_lm_head else 1)
        return Cost(layers=1, flops=2.0 * batch * (blocks + n * scorers), bytes=float(itemsize * read))

    def init(self, groups: Groups) -> State:
        """The target's hidden state at the last position of each row, ``[B, H]``."""
        return jnp.zeros((groups.rows, self.config.layer.hidden_size), jnp.dtype(self.dtype))

    def buffers(self, groups: Groups) -> tuple[Buffer, ...]:
        """Weights, and a feature a row."""
        B, H, dtype = groups.rows, self.config.layer.hidden_size, jnp.dtype(self.dtype)
        return self.weights_buffer(), Buffer("draft feature", (B, H), self.dtype, B * H * dtype.itemsize)

    def live_sets(self, target: ForwardShape, chunk: int | None) -> tuple[LiveSet, ...]:
        """The heads' logits in a step; of a prompt's chunk one row of its features."""
        own = self.config.own_lm_head or self.config.draft_vocab_size is not None
        draft = dataclasses.replace(
            target,
            config=dataclasses.replace(self.config.layer, vocab_size=self.config.num_draft_tokens),
            nodes=self.max_depth,
            shards=1 if own else target.shards,
            quantized=False,
            taps=0,
        )
        own_rows = self.config.own_lm_head
        return medusa_live_sets(draft, self.config.num_heads, own_rows, self.branches, chunk)

    # ------------------------------------------------------------ traced

    def observe(
        self,
        view: View,
        state: State,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R C"],
        starts: Int[Array, " R"],
        counts: Int[Array, " R"],
    ) -> State:
        """Keep the last feature told, or the one before where none is."""
        assert view.features is not None
        last = jnp.maximum(counts - 1, 0)[:, None, None]
        told = jnp.take_along_axis(view.features, last, axis=1)[:, 0].astype(state.dtype)
        return state.at[rows].set(jnp.where(counts[:, None] > 0, told, state[rows]))

    def propose(
        self, view: View, state: State, pending: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> tuple[Tree, State]:
        """The token of each node from its depth's head, by rank."""
        head: MedusaHead = self.merge(view)
        form, k, (B,) = self.tree, self.branches, pending.shape
        scores = head.scores(view.model, self.max_depth, state[:, None])
        best = jnp.concatenate([_likeliest(x, k) for x in scores], axis=1).reshape(B, -1)
        place = [(depth - 1) * k + rank for depth, rank in zip(form.depths, form.ranks, strict=True)][1:]
        tokens = to_target_ids(head, best[:, np.array(place, np.int32)])
        parents, depths = (
            jnp.broadcast_to(jnp.array(x, jnp.int32)[None, :], (B, self.num_nodes))
            for x in (form.parents, form.depths)
        )
        return Tree(jnp.concatenate([pending[:, None], tokens], axis=1), parents, depths), state


def _likeliest(scores: Float[Array, "B n V"], k: int) -> Int[Array, "B n k"]:
    """The k likeliest tokens, all different whatever the scores are."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    best = jnp.argmax(scores, axis=-1, keepdims=True) if k == 1 else jax.lax.top_k(scores, k)[1]
    return best.astype(jnp.int32)
