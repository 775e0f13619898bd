"""A smaller Llama as the drafter, with weights and a cache of its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from specmemo_jax.draft.beam import BeamDrafter, TreeShape, beam_cost, beam_draft
from specmemo_jax.draft.live_sets import beam_live_sets
from specmemo_jax.draft.protocol import State, View
from specmemo_jax.draft.tree import Tree
from specmemo_jax.llama import kv
from specmemo_jax.llama.buffers import Buffer, Cost, cache_buffer
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Groups, Leaf, RowAt
from specmemo_jax.llama.live_sets import ForwardShape, LiveSet, attention, projections, until_commit
from specmemo_jax.llama.model import forward
from specmemo_jax.llama.packing import Target, abstract_model, abstract_target, merge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftState:
    """``caches``: the draft's own, ``[B, K, slots(S), D]`` a layer of a group; ``known`` ``[B]``: positions
    it holds of each row; ``unread`` ``[B, depth]``: committed tokens after those.
    """

    caches: kv.Caches
    known: Leaf
    unread: Leaf


@dataclasses.dataclass(frozen=True)
class DraftModel(BeamDrafter):
    """Any Llama with the target's vocabulary as the drafter (arXiv 2211.17192, 2302.01318).

    Args:
        config: the draft's.
        load: gives the packed weights; called once, after the plan was made.
        shape: the tree it proposes.
        dtype: of its weights and its cache.
        vocab_size: the target's; ids from there on are never proposed.
        name: what tables and messages call it.
        room: levels its state has room for, where that is more than the shape's (`limited`).
        platform: what it runs on, as JAX spells it.

    Its cache holds committed tokens only. A step costs ``depth`` passes: the first reads what the
    last step committed together with the pending token, so that nothing is read twice and a
    rejected branch is never in the cache.
    """

    config: LlamaConfig
    load: Callable[[], Target]
    shape: TreeShape
    dtype: str
    vocab_size: int
    name: str = "draft model"
    room: int | None = None
    platform: str = "cpu"

    @classmethod
    def of(cls, draft: Target, shape: TreeShape, vocab_size: int | None = None) -> "DraftModel":
        """A drafter of weights that are packed already."""
        vocab_size = vocab_size or draft.config.vocab_size
        dtype, platform = draft.dtype.name, draft.platform
        return cls(draft.config, lambda: draft, shape, dtype, vocab_size, platform=platform)

    def weights(self, target: Target) -> Any:
        """The packed weights, loaded now."""
        return self.load().leaves

    def weight_shapes(self, target: Target) -> Any:
        """Of the packed weights."""
        return abstract_target(self.config, jnp.dtype(self.dtype), target.platform).leaves

    def limited(self, num_nodes: int) -> "DraftModel":
        """The same weights and cache, a smaller tree."""
        return dataclasses.replace(self, shape=self.shape.limited(num_nodes), room=self.levels)

    def work(self, config: LlamaConfig, itemsize: int, batch: int, length: int) -> Cost:
        """Its passes: what was committed, then level by level."""
        own = jnp.dtype(self.dtype).itemsize
        return beam_cost(self.config, self.config.num_layers, own, self.shape, batch, length)

    @property
    def levels(self) -> int:
        """U: the most committed tokens that wait to be read."""
        return self.max_depth if self.room is None else self.room

    def slots(self, capacity: int) -> int:
        """Of a row's own cache, in steps as the target's: for others XLA's GPU backend keeps a padded copy
        of every layer, for cuBLAS' tensor cores (8) or for products summed in parts (their number).
        """
        return -(-(capacity + self.levels) // kv.SLOTS) * kv.SLOTS

    def _own(self, groups: Groups) -> Groups:
        return Groups(tuple((rows, self.slots(slots)) for rows, slots in groups))

    def init(self, groups: Groups) -> State:
        """An empty cache with room for the last prompt chunk with what was unread before it."""
        config, dtype, B = self.config, jnp.dtype(self.dtype), groups.rows
        heads, D = config.num_kv_heads, config.head_dim
        slots_last = kv.keys_slots_last(dtype, self.platform)
        return DraftState(
            caches=kv.init_caches(config.num_layers, self._own(groups), heads, D, dtype, slots_last),
            known=jnp.zeros((B,), jnp.int32),
            unread=jnp.zeros((B, self.levels), jnp.int32),
        )

    def grow(self, state: State, groups: Groups) -> State:
        """Pad the cache."""
        return dataclasses.replace(state, caches=kv.grow(state.caches, self._own(groups)))

    def move(
        self,
        state: State,
        source: RowAt,
        target: RowAt,
        platform: str,
    ) -> State:
        """What is known of the row, and its part of the cache."""
        row, to = source[1], target[1]
        known, unread = (x.at[to].set(x[row]) for x in (state.known, state.unread))
        return DraftState(kv.move_row(state.caches, source, target, platform), known, unread)

    def buffers(self, groups: Groups) -> tuple[Buffer, ...]:
        """Weights, cache and the unread tokens."""
        config, item, B = self.config, jnp.dtype(self.dtype).itemsize, groups.rows
        vector = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
        weights = config.num_params
        return (
            Buffer("draft weights", (weights,), self.dtype, weights * item, "weights"),
            cache_buffer("draft KV", self._own(groups), vector, self.dtype, item),
            Buffer("draft unread", (B, 1 + self.levels), "int32", 4 * B * (1 + self.levels)),
        )

    def live_sets(self, target: ForwardShape, chunk: int | None) -> tuple[LiveSet, ...]:
        """A step's passes, or a prompt's chunk with what was unread before it, on a copy of one row."""
        draft = dataclasses.replace(
            target,
            config=self.config,
            itemsize=jnp.dtype(self.dtype).itemsize,
            slots=self.slots(target.slots),
            most=self.slots(target.widest),
            shards=1,
            layers=None,
            seen=None,
            score_nodes=None,
            quantized=False,
        )
        if chunk is None:
            return beam_live_sets(draft, self.levels, self.shape)
        read = dataclasses.replace(draft, rows=1, nodes=chunk + self.levels, gathered=target.rows > 1)
        return *attention(read), *projections(read), until_commit(read)

    def observe(
        self,
        view: View,
        state: State,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R C"],
        starts: Int[Array, " R"],
        counts: Int[Array, " R"],
    ) -> State:
        """Read a prompt's chunk now; keep a step's few tokens for the next `propose`."""
        if view.group is not None:
            return self._read(view, state, rows, tokens, starts, counts)
        # `propose` has read up to the pending token, the first of these.
        waiting = jnp.pad(tokens, ((0, 0), (0, self.levels)))[:, 1 : self.levels + 1]
        return dataclasses.replace(state, unread=waiting)

    def _read(
        self,
        view: View,
        state: DraftState,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R C"],
        starts: Int[Array, " R"],
        counts: Int[Array, " R"],
    ) -> DraftState:
        """One pass over what is still unread before ``starts`` and the chunk."""
        U, C = state.unread.shape[1], tokens.shape[1]
        gap = starts - state.known[rows]
        gap = jnp.where(gap > 0, gap, 0)
        begin, columns = starts - gap, jnp.arange(U + C)[None, :]
        both = jnp.concatenate([state.unread[rows], tokens], axis=1)
        from_chunk = columns - gap[:, None] + U
        both = jnp.take_along_axis(
            both, jnp.minimum(jnp.where(columns < gap[:, None], columns, from_chunk), U + C - 1), axis=1
        )
        model, positions = self._merge(view), begin[:, None] + columns
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((1, U + C, U + C), bool)), (len(rows), U + C, U + C))
        group = view.group or 0
        cache, own = state.caches[group], rows - kv.first_row(state.caches, group)
        hidden, new = forward(model, (cache,), both, positions, causal, begin, rows=own)
        begin = kv.ordered_after(begin, hidden[:, 0, 0])
        written = kv.write(cache, new, begin, own, view.model.platform)
        return dataclasses.replace(
            state,
            caches=kv.replace(state.caches, group, written),
            known=state.known.at[rows].set(starts + counts),
        )

    def propose(
        self, view: View, state: State, pending: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> tuple[Tree, State]:
        """Read what is unread and ``pending``, then look ahead."""
        known = jnp.minimum(state.known, lengths)
        tree, read = beam_draft(
            self._merge(view),
            state.caches,
            known,
            state.unread,
            lengths - known,
            pending,
            self.shape,
            self.vocab_size,
        )
        starts = kv.ordered_after(known, tree.tokens[:, -1])
        caches = kv.write_every(state.caches, read, starts, view.model.platform)
        return tree, dataclasses.replace(state, caches=caches, known=lengths + 1)

    def truncate(self, state: State, lengths: Int[Array, " B"]) -> State:
        """Positions from there on are unknown again; the tokens before them that were unread stay so."""
        return dataclasses.replace(state, known=jnp.minimum(state.known, lengths))

    def _merge(self, view: View) -> Any:
        graph, tree, _ = abstract_model(self.config, jnp.dtype(self.dtype), platform=view.model.platform)
        return merge(graph, tree, view.weights)
