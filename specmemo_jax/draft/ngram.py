"""Prompt lookup (Saxena 2023; also arXiv 2304.04487): the row's own text as the drafter, on the device.

The last few tokens are searched for earlier in the row. The continuations of the best
matches, longest first and then latest, become branches of a small tree. No weights. What a match
is worth is learned as the row goes on: a text in which matches of some length mislead is told
after a few tokens, whether it was guessed at or not.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.draft.protocol import Drafter, View
from specmemo_jax.draft.tree import NO_TOKEN, Tree
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.buffers import Buffer
from specmemo_jax.llama.kv import Groups, Leaf
from specmemo_jax.llama.live_sets import FULL, ForwardShape, LiveSet, array

LEARNING_RATE = 0.125  # what the last match counts; a power of 2, so that hosts and devices round alike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HitRates:
    """How often a row's matches foretold the next token.

    ``rates`` ``[B, N]``: of matches of 1 to N tokens, the last ones weighing most.
    ``last_guesses`` ``[B, 3]``: what the last match foretold: a token, its position, how many tokens matched.
    """

    rates: Leaf
    last_guesses: Leaf

    def checked(self, history: Int[Array, "B S"], lengths: Int[Array, " B"]) -> Float[Array, "B N"]:
        """The rates after the last guess, whose token is known by now unless its row is done.

        ``history`` must hold every token before ``lengths``: a guess is judged by what stands at its place.
        So a drafter that slept is told what it missed in every row before it proposes again.
        """
        token, position, matched = jnp.moveaxis(self.last_guesses, 1, 0)
        came = jnp.take_along_axis(history, position[:, None], axis=1)[:, 0]
        hit = (came == token).astype(jnp.float32)
        known = jnp.where(position <= lengths, matched, 0)
        used = jnp.arange(1, self.rates.shape[1] + 1)[None, :] == known[:, None]
        return jnp.where(used, updated_rate(self.rates, hit[:, None]), self.rates)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NgramState:
    """The tokens of each row by position, ``[B, S]``, and what its matches were found to be worth."""

    history: Leaf
    hit_rates: HitRates | Leaf | None


def updated_rate(chance: Any, hit: Any) -> Any:
    """A chance after one more match, which foretold the next token (1) or not (0)."""
    return chance - LEARNING_RATE * chance + LEARNING_RATE * hit


@dataclasses.dataclass(frozen=True)
class NgramDrafter(Drafter):
    """``num_nodes`` T (root included) shared by up to ``branches`` continuations.

    ``decay`` and ``branch_decay`` rank the nodes: a node ``d`` levels down the ``w``-th
    branch counts ``branch_decay**w * decay**d``, and the best of the branches that exist
    are proposed. With one branch the tree is a chain.

    ``ladder``: how much a match is worth, as ``(nodes, least matched tokens)`` rising to
    ``(num_nodes, ...)``. A step that finds less than its first rung asks for is plain
    decoding (but see below); empty, every match fills all nodes. It pays where a node is not free to verify.

    ``min_hit_rate``: with a ladder, how often matches of a length must have foretold the row's next token
    for one to fill any nodes; 0 for no matter how often. Those that the ladder asks for begin half-way
    from it to 1, shorter ones half-way to 0: they fill the first rung once they have proved themselves.
    """

    num_nodes: int = 8
    branches: int = 3
    max_ngram: int = 4
    decay: float = 0.75
    branch_decay: float = 0.3
    ladder: tuple[tuple[int, int], ...] = ()
    min_hit_rate: float = 0.0
    name: str = "ngram"

    def __post_init__(self) -> None:
        if self.num_nodes < 2:
            raise ConfigError(
                f"ngram needs at least 2 tree nodes (root and a candidate), found {self.num_nodes}"
            )
        if self.branches < 1 or self.max_ngram < 1:
            raise ConfigError(
                f"branches ({self.branches}) and max_ngram ({self.max_ngram}) must be at least 1"
            )
        if self.ladder:
            nodes, matches = zip(*self.ladder, strict=True)
            rising = all(a < b for steps in (nodes, matches) for a, b in itertools.pairwise(steps))
            if not rising or nodes[0] < 2 or nodes[-1] != self.num_nodes or matches[-1] > self.max_ngram:
                raise ConfigError(
                    f"ladder {self.ladder} must rise from 2 nodes or more to num_nodes ({self.num_nodes}), "
                    f"with matches rising to max_ngram ({self.max_ngram}) at most"
                )
        if not 0 <= self.min_hit_rate < 1 or (self.min_hit_rate and not self.ladder):
            raise ConfigError(
                f"min_hit_rate ({self.min_hit_rate}) must be from 0 to below 1, and 0 without a ladder"
            )

    @property
    def is_chain(self) -> bool:
        """No second branch is possible."""
        return self.branches == 1 or self.num_nodes == 2

    @property
    def max_leaves(self) -> int:
        """One a branch."""
        return min(self.branches, self.num_nodes - 1)

    @property
    def verify_buckets(self) -> tuple[int, ...]:
        """The root alone and each rung, or every node always."""
        return (1, *(nodes for nodes, _ in self.ladder)) if self.ladder else (self.num_nodes,)

    @property
    def tree_sizes(self) -> tuple[int, ...]:
        """A ladder moves by itself at every step; else a half and the whole."""
        half = self.num_nodes // 2
        return (self.num_nodes,) if self.ladder or half < 2 else (half, self.num_nodes)

    @property
    def initial_hit_rates(self) -> tuple[float, ...]:
        """Of matches of 1 to N tokens, before any was seen in a row."""
        asked = self.ladder[0][1] if self.ladder else 1
        untried, usual = self.min_hit_rate / 2, (1 + self.min_hit_rate) / 2
        return tuple(untried if n < asked else usual for n in range(1, self.max_ngram + 1))

    def limited(self, num_nodes: int) -> "NgramDrafter":
        """The same history, fewer nodes."""
        if not self.ladder:
            return dataclasses.replace(self, num_nodes=num_nodes)
        below = [rung for rung in self.ladder if rung[0] < num_nodes]
        match = self.ladder[min(len(below), len(self.ladder) - 1)][1]
        return dataclasses.replace(self, num_nodes=num_nodes, ladder=(*below, (num_nodes, match)))

    def init(self, groups: Groups) -> NgramState:
        """Token history ``[B, S]``, every row's as wide as the widest group's, and hit rates ``[B, N]``."""
        history = jnp.full((groups.rows, groups.most), NO_TOKEN, jnp.int32)
        if not self.min_hit_rate:
            return NgramState(history, None)
        rates = jnp.tile(jnp.asarray(self.initial_hit_rates, jnp.float32), (groups.rows, 1))
        return NgramState(history, HitRates(rates, jnp.zeros((groups.rows, 3), jnp.int32)))

    def grow(self, state: NgramState, groups: Groups) -> NgramState:
        """Pad the history."""
        more = groups.most - state.history.shape[1]
        history = jnp.pad(state.history, ((0, 0), (0, more)), constant_values=NO_TOKEN)
        return NgramState(history, state.hit_rates)

    def buffers(self, groups: Groups) -> tuple[Buffer, ...]:
        """The history, and the hit rates."""
        B, S, N = groups.rows, groups.most, self.max_ngram
        history = Buffer("ngram history", (B, S), "int32", 4 * B * S)
        if not self.min_hit_rate:
            return (history,)
        rates = Buffer("ngram hit rates", (B, N), "float32", 4 * B * N)
        return (history, rates, Buffer("ngram last guesses", (B, 3), "int32", 4 * B * 3))

    def live_sets(self, target: ForwardShape, chunk: int | None) -> tuple[LiveSet, ...]:
        """The history with its pending token, rolled, matched and scored; reading a chunk takes nothing."""
        if chunk is not None:
            return ()
        return ((array("history, matches and scores", (8, target.rows, target.widest), FULL, "int32"),),)

    def observe(
        self,
        view: View,
        state: NgramState,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R C"],
        starts: Int[Array, " R"],
        counts: Int[Array, " R"],
    ) -> NgramState:
        """`record`: the target is not looked at."""
        return self.record(state, rows, tokens, starts, counts)

    def record(
        self,
        state: NgramState,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R C"],
        starts: Int[Array, " R"],
        counts: Int[Array, " R"],
    ) -> NgramState:
        """Write the tokens where they stand; the rest of the chunk is dropped. The hit rates belong to the
        row's text: one that starts anew, is told another text, or less of it than was guessed from (a chat
        that took a turn back), begins with the first rates again.
        """
        S = state.history.shape[1]
        columns = jnp.arange(tokens.shape[1])[None, :]
        told = columns < counts[:, None]
        positions = jnp.where(told, starts[:, None] + columns, S)
        history = state.history.at[rows[:, None], positions].set(tokens, mode="drop")
        if state.hit_rates is None:
            return NgramState(history, None)
        known = state.hit_rates.last_guesses[rows, 1] - 1  # positions that were observed before the guess
        before = state.history[rows[:, None], jnp.minimum(positions, S - 1)]
        differs = jnp.any(told & (positions < known[:, None]) & (before != tokens), axis=1)
        anew = jnp.where((starts == 0) | differs | (starts + counts < known), rows, history.shape[0])
        rates = state.hit_rates.rates.at[anew].set(jnp.asarray(self.initial_hit_rates), mode="drop")
        guesses = state.hit_rates.last_guesses.at[anew].set(0, mode="drop")
        return NgramState(history, HitRates(rates, guesses))

    def propose(
        self, view: View, state: NgramState, pending: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> tuple[Tree, NgramState]:
        """`look_up`: the target is not looked at."""
        return self.look_up(state, pending, lengths)

    def look_up(
        self, state: NgramState, pending: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> tuple[Tree, NgramState]:
        """Continuations of the longest, then latest, earlier occurrences of the row's last tokens."""
        B, S = state.history.shape
        W = min(self.branches, self.num_nodes - 1)
        history = state.history.at[jnp.arange(B), lengths].set(pending, mode="drop")
        matched = _matched(history, lengths, self.max_ngram)
        scores = jnp.where(matched > 0, matched * S + jnp.arange(S)[None, :], 0)
        first = jnp.roll(history, -1, axis=1)
        chains, found = [], []
        for _ in range(W):
            best = jnp.argmax(scores, axis=1)
            score = jnp.take_along_axis(scores, best[:, None], axis=1)[:, 0]
            # A match that ends d tokens before the end repeats with period d beyond it.
            period = jnp.maximum(lengths - best, 1)
            steps = jnp.arange(self.max_depth)[None, :] % period[:, None]
            chains.append(jnp.take_along_axis(history, jnp.clip(best[:, None] + 1 + steps, 0, S - 1), axis=1))
            found.append(score > 0)
            scores = jnp.where(first == chains[-1][:, :1], 0, scores)
        longest, hit_rates = jnp.max(matched, axis=1), state.hit_rates
        worth = self._worth(longest)
        if hit_rates is not None:
            rates = hit_rates.checked(history, lengths)
            rate = jnp.take_along_axis(rates, jnp.maximum(longest - 1, 0)[:, None], axis=1)[:, 0]
            proved = self._worth(jnp.maximum(longest, self.ladder[0][1]))
            worth = jnp.where((longest > 0) & (rate >= self.min_hit_rate), proved, 1)
            hit_rates = HitRates(rates, jnp.stack([chains[0][:, 0], lengths + 1, longest], axis=1))
        tree = self._grow_tree(pending, jnp.stack(chains, 1), jnp.stack(found, 1), worth)
        return tree, NgramState(state.history, hit_rates)

    def _worth(self, matched: Int[Array, " B"]) -> Int[Array, " B"]:
        """Node budget, root included, of a match of so many tokens."""
        if not self.ladder:
            return jnp.full_like(matched, self.num_nodes)
        nodes, matches = (jnp.asarray(x, jnp.int32) for x in zip((1, 0), *self.ladder, strict=True))
        return nodes[jnp.sum(matched[:, None] >= matches[None, 1:], axis=1)]

    def _grow_tree(
        self,
        pending: Int[Array, " B"],
        chains: Int[Array, "B W D"],
        found: Bool[Array, "B W"],
        worth: Int[Array, " B"],
    ) -> Tree:
        """Keep the ``worth - 1`` best nodes of the branches that were found, parents before children."""
        B, W, D = chains.shape
        ahead = jnp.asarray(_nodes_ahead(W, D, self.decay, self.branch_decay))
        rank = jnp.einsum("bv,wdv->bwd", found.astype(jnp.int32), ahead)
        kept = found[:, :, None] & (rank + 1 < worth[:, None, None])
        slot = jnp.where(kept, rank + 1, self.num_nodes)
        parent = jnp.concatenate([jnp.zeros((B, W, 1), jnp.int32), slot[:, :, :-1]], axis=2)
        depth = jnp.broadcast_to(jnp.arange(1, D + 1, dtype=jnp.int32), (B, W, D))
        rows = jnp.arange(B)[:, None]
        flat = slot.reshape(B, W * D)

        def place(root: Array, values: Array) -> Array:
            nodes = jnp.full((B, self.num_nodes), jnp.int32(0)).at[:, 0].set(root)
            return nodes.at[rows, flat].set(values.reshape(B, W * D), mode="drop")

        filled = place(jnp.ones((B,), jnp.int32), jnp.ones_like(slot)) > 0
        zero = jnp.zeros((B,), jnp.int32)
        tokens = jnp.where(filled, place(pending, chains), NO_TOKEN)
        return Tree(tokens=tokens, parents=place(zero, parent), depths=place(zero, depth))


def _matched(history: Int[Array, "B S"], lengths: Int[Array, " B"], max_ngram: int) -> Int[Array, "B S"]:
    """How many tokens that end at each position, before the last, equal the row's last ones."""
    columns = jnp.arange(history.shape[1])[None, :]
    matching = columns < lengths[:, None]
    matched = jnp.zeros(history.shape, jnp.int32)
    for back in range(max_ngram):
        suffix = jnp.take_along_axis(history, jnp.maximum(lengths[:, None] - back, 0), axis=1)
        matching = matching & (jnp.roll(history, back, axis=1) == suffix) & (columns >= back)
        matched = matched + matching.astype(jnp.int32)
    return matched


@functools.cache
def _nodes_ahead(W: int, D: int, decay: float, branch_decay: float) -> np.ndarray:
    """``[W, D, W]``: how many nodes of branch ``v`` are worth more than node ``(w, d)``."""
    worth = branch_decay ** np.arange(W)[:, None] * decay ** np.arange(D)[None, :]
    worth -= 1e-9 * np.arange(W)[:, None]  # a tie goes to the earlier branch
    return (worth[None, None] > worth[:, :, None, None]).sum(-1).astype(np.int32)


def chain(num_nodes: int = 8, max_ngram: int = 4) -> NgramDrafter:
    """Prompt lookup without branches."""
    return NgramDrafter(num_nodes=num_nodes, branches=1, max_ngram=max_ngram)
