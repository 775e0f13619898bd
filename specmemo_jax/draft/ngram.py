"""Prompt lookup (Saxena 2023; also arXiv 2304.04487): the row's own text as the drafter, on the device.

The last few tokens are searched for earlier in the row. The continuations of the best
matches, longest first and then latest, become branches of a small tree. No weights.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from specmemo_jax.errors import ConfigError
from specmemo_jax.memory.buffers import Buffer
from specmemo_jax.speculate.tree import NO_TOKEN, Tree

State = Int[Array, "B S"]


@dataclasses.dataclass(frozen=True)
class NgramDrafter:
    """``num_nodes`` T (root included) shared by up to ``branches`` continuations.

    ``decay`` and ``branch_decay`` rank the nodes: a node ``d`` levels down the ``w``-th
    branch counts ``branch_decay**w * decay**d``, and the T - 1 best of the branches that
    exist are proposed. With one branch the tree is a chain.
    """

    num_nodes: int = 8
    branches: int = 3
    max_ngram: int = 4
    decay: float = 0.75
    branch_decay: float = 0.3
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

    @property
    def max_depth(self) -> int:
        """One branch may take all the nodes."""
        return self.num_nodes - 1

    @property
    def is_chain(self) -> bool:
        """No second branch is possible."""
        return self.branches == 1 or self.num_nodes == 2

    def init(self, batch: int, context: int) -> State:
        """Token history ``[B, context]``."""
        return jnp.full((batch, context), NO_TOKEN, jnp.int32)

    def buffers(self, batch: int, context: int) -> tuple[Buffer, ...]:
        """The history."""
        return (Buffer("ngram history", (batch, context), "int32", 4 * batch * context),)

    def observe(
        self,
        state: State,
        tokens: Int[Array, "B C"],
        starts: Int[Array, " B"],
        counts: Int[Array, " B"],
    ) -> State:
        """Write the tokens where they stand; the rest of the chunk is dropped."""
        C, S = tokens.shape[1], state.shape[1]
        columns = jnp.arange(C)[None, :]
        positions = jnp.where(columns < counts[:, None], starts[:, None] + columns, S)
        rows = jnp.arange(tokens.shape[0])[:, None]
        return state.at[rows, positions].set(tokens, mode="drop")

    def truncate(self, state: State, lengths: Int[Array, " B"]) -> State:
        """Nothing to do: positions from ``lengths`` on are never read."""
        return state

    def propose(self, state: State, pending: Int[Array, " B"], lengths: Int[Array, " B"]) -> Tree:
        """Continuations of the longest, then latest, earlier occurrences of the row's last tokens."""
        B, S = state.shape
        W = min(self.branches, self.num_nodes - 1)
        history = state.at[jnp.arange(B), lengths].set(pending, mode="drop")
        scores = _match_scores(history, lengths, self.max_ngram)
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
        return self._grow(pending, jnp.stack(chains, 1), jnp.stack(found, 1))

    def _grow(
        self, pending: Int[Array, " B"], chains: Int[Array, "B W D"], found: Bool[Array, "B W"]
    ) -> Tree:
        """Keep the T - 1 best nodes of the branches that were found, parents before children."""
        B, W, D = chains.shape
        ahead = jnp.asarray(_nodes_ahead(W, D, self.decay, self.branch_decay))
        rank = jnp.einsum("bv,wdv->bwd", found.astype(jnp.int32), ahead)
        slot = jnp.where(found[:, :, None], rank + 1, self.num_nodes)
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


def _match_scores(history: Int[Array, "B S"], lengths: Int[Array, " B"], max_ngram: int) -> Int[Array, "B S"]:
    """``(matched length) * S + position`` where a suffix of the row also ends earlier, else 0."""
    S = history.shape[1]
    columns = jnp.arange(S)[None, :]
    matching = columns < lengths[:, None]
    matched = jnp.zeros(history.shape, jnp.int32)
    for back in range(max_ngram):
        suffix = jnp.take_along_axis(history, jnp.maximum(lengths[:, None] - back, 0), axis=1)
        matching = matching & (jnp.roll(history, back, axis=1) == suffix) & (columns >= back)
        matched = matched + matching.astype(jnp.int32)
    return jnp.where(matched > 0, matched * S + columns, 0)


@functools.cache
def _nodes_ahead(W: int, D: int, decay: float, branch_decay: float) -> np.ndarray:
    """``[W, D, W]``: how many nodes of branch ``v`` are worth more than node ``(w, d)``."""
    worth = branch_decay ** np.arange(W)[:, None] * decay ** np.arange(D)[None, :]
    worth -= 1e-9 * np.arange(W)[:, None]  # a tie goes to the earlier branch
    return (worth[None, None] > worth[:, :, None, None]).sum(-1).astype(np.int32)


def chain(num_nodes: int = 8, max_ngram: int = 4) -> NgramDrafter:
    """Prompt lookup without branches."""
    return NgramDrafter(num_nodes=num_nodes, branches=1, max_ngram=max_ngram)
