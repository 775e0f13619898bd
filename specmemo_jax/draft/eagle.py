"""EAGLE: one decoder layer over the target's own features guesses the next ones (arXiv 2401.15077).

Slot p of the draft's cache is of the pair (token at p + 1, the target's hidden states at p), and its output
says what token follows at p + 2. A path that is drafted goes on from the head's own outputs; what the target
accepts is read again from the target's true features, so that nothing guessed stays in the cache. Trees grow
by joint probability (EAGLE-2, arXiv 2406.16858); EAGLE-3 (arXiv 2503.01840) is the same with other inputs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.draft.beam import BeamDrafter, Passes, TreeShape, grow_tree
from specmemo_jax.draft.head_config import HeadConfig
from specmemo_jax.draft.head_drafter import HeadDrafter
from specmemo_jax.draft.heads import EagleHead, to_target_ids
from specmemo_jax.draft.live_sets import head_live_sets
from specmemo_jax.draft.protocol import State, View
from specmemo_jax.draft.tree import Tree
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama import kv
from specmemo_jax.llama.buffers import Buffer, Cost, cache_buffer
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Groups, Leaf, NewKV, RowAt
from specmemo_jax.llama.live_sets import ForwardShape, LiveSet
from specmemo_jax.llama.model import Sight, embed, run_block
from specmemo_jax.llama.packing import Target
from specmemo_jax.llama.rope import rope_tables

# Plain steps whose features wait to be read: fewer would be read too often, and reading more would be the
# program that takes most memory.
WAITING = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EagleState:
    """``caches``: the head's own layer, ``[B, K, slots(S), D]`` of a group; ``known`` ``[B]``: slots of each
    row that are in it. ``tokens`` ``[B, W]`` and ``features`` ``[B, W, F]``: of the positions from there on.
    """

    caches: kv.Caches
    known: Leaf
    tokens: Leaf
    features: Leaf


@dataclasses.dataclass(frozen=True)
class EagleDrafter(HeadDrafter, BeamDrafter):
    """EAGLE 1, 2 or 3 for a target.

    Args:
        config: the head's.
        load: gives its packed weights for a target; called once, after the plan was made.
        shape: the tree it proposes; one branch is EAGLE's chain, more are EAGLE-2's dynamic tree.
        dtype: of its weights, its cache and the features; the target's.
        name: what tables and messages call it.
        room: levels that its state has room for, where that is more than the shape's (`limited`).
        platform: what it runs on, as JAX spells it.
    """

    config: HeadConfig
    load: Callable[[Target], Any] = dataclasses.field(compare=False)
    shape: TreeShape
    dtype: str
    name: str = "eagle"
    room: int | None = None
    platform: str = "cpu"

    def __post_init__(self) -> None:
        most = self.config.num_draft_tokens
        if self.shape.branches > most:
            raise ConfigError(
                f"{self.name} can propose {most} tokens, a tree of {self.shape.branches} branches was asked "
                f"for; {most} branches at most would work"
            )

    @property
    def most_waiting(self) -> int:
        """As many as the state has room for."""
        return WAITING

    @property
    def most_read(self) -> int:
        """P: positions that a step commits at most, which the next one reads."""
        return (self.max_depth if self.room is None else self.room) + 1

    @property
    def window(self) -> int:
        """W: positions that wait at most."""
        return self.most_read + WAITING

    def limited(self, num_nodes: int) -> "EagleDrafter":
        """The same weights and state, a smaller tree."""
        return dataclasses.replace(self, shape=self.shape.limited(num_nodes), room=self.most_read - 1)

    def work(self, config: LlamaConfig, itemsize: int, batch: int, length: int) -> Cost:
        """Its passes over one layer, and the rows of its vocabulary each time."""
        c, shape = self.config.layer, self.shape
        rows = batch * (2 + (shape.depth - 1) * shape.branches)  # two in the first pass: about what waits
        weights = self.config.num_draft_tokens * c.hidden_size
        weights += sum(
            math.prod(shape)
            for name, shape in self.config.tensor_shapes().items()
            if len(shape) == 2 and name != "lm_head.weight"
        )
        attention = 4 * c.num_heads * c.head_dim * length * rows
        cache = 2 * c.num_kv_heads * c.head_dim * length * batch
        return Cost(
            layers=shape.depth,
            flops=2.0 * weights * rows + attention,
            bytes=float(shape.depth * itemsize * (weights + cache)),
        )

    def slots(self, capacity: int) -> int:
        """Of a row's own cache: what a pass writes beyond the row has room, too."""
        return -(-(capacity + self.window) // kv.SLOTS) * kv.SLOTS

    def _own(self, groups: Groups) -> Groups:
        return Groups(tuple((rows, self.slots(slots)) for rows, slots in groups))

    def init(self, groups: Groups) -> State:
        """Nothing known of any row."""
        layer, dtype, B, W = self.config.layer, jnp.dtype(self.dtype), groups.rows, self.window
        slots_last = kv.keys_slots_last(dtype, self.platform)
        own, width = self._own(groups), len(self.taps) * layer.hidden_size
        return EagleState(
            caches=kv.init_caches(1, own, layer.num_kv_heads, layer.head_dim, dtype, slots_last),
            known=jnp.zeros((B,), jnp.int32),
            tokens=jnp.zeros((B, W), jnp.int32),
            features=jnp.zeros((B, W, width), dtype),
        )

    def grow(self, state: State, groups: Groups) -> State:
        """Pad the cache."""
        return dataclasses.replace(state, caches=kv.grow(state.caches, self._own(groups)))

    def move(self, state: State, source: RowAt, target: RowAt, platform: str) -> State:
        """What is known of the row and what waits, and its part of the cache."""
        row, to = source[1], target[1]
        waiting = (x.at[to].set(x[row]) for x in (state.known, state.tokens, state.features))
        return EagleState(kv.move_row(state.caches, source, target, platform), *waiting)

    def buffers(self, groups: Groups) -> tuple[Buffer, ...]:
        """Weights, cache, and the features that wait."""
        layer, item, B, W = self.config.layer, jnp.dtype(self.dtype).itemsize, groups.rows, self.window
        width = len(self.taps) * layer.hidden_size
        vector = (1, 2, layer.num_kv_heads, layer.head_dim)
        return (
            self.weights_buffer(),
            cache_buffer("draft KV", self._own(groups), vector, self.dtype, item),
            Buffer("draft tokens", (B, 1 + W), "int32", 4 * B * (1 + W)),
            Buffer("draft features", (B, W, width), self.dtype, B * W * width * item),
        )

    def live_sets(self, target: ForwardShape, chunk: int | None) -> tuple[LiveSet, ...]:
        """A step's passes, or one over a prompt's chunk and what waited before it."""
        draft = dataclasses.replace(
            target,
            config=dataclasses.replace(self.config.layer, vocab_size=self.config.num_draft_tokens),
            slots=self.slots(target.slots),
            most=self.slots(target.widest),
            shards=1,
            layers=None,
            seen=None,
            score_nodes=None,
            quantized=False,
            taps=0,
        )
        inputs = self.config.tensor_shapes()["fc.weight"][1]
        return head_live_sets(draft, inputs, self.shape, self.most_read, self.window, chunk)

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
        """Read a prompt's chunk now but for its last position; keep a step's for the next `propose`."""
        assert view.features is not None
        if view.group is None:
            W, known, waiting = self.window, state.known, starts - state.known
            if tokens.shape[1] > 1:  # drafted: `propose` has read what waited, for rows that go on
                known, waiting = jnp.where(counts > 0, starts, known), jnp.where(counts > 0, 0, W)
            both = self._joined(state, rows, tokens, view.features, waiting)
            return dataclasses.replace(state, known=known, tokens=both[0][:, :W], features=both[1][:, :W])
        waiting = jnp.maximum(starts - state.known[rows], 0)
        both = self._joined(state, rows, tokens, view.features, waiting)
        return self._read(view, state, rows, *both, starts - waiting, waiting + counts)

    def settle(self, view: View, state: State, lengths: Int[Array, " B"]) -> State:
        """Read what waits but for the last position of each row."""
        rows, known = jnp.arange(lengths.shape[0]), jnp.minimum(state.known, lengths)
        return self._read(view, state, rows, state.tokens, state.features, known, lengths - known)

    def propose(
        self, view: View, state: State, pending: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> tuple[Tree, State]:
        """Read what waits, whose last position is followed by ``pending``, and look ahead. It goes on waiting
        until `observe` says that the row has gone on: another does not forget it.
        """
        head, P = self.merge(view), self.most_read
        known = jnp.minimum(state.known, lengths)
        last = jnp.clip(lengths - known - 1, 0, P - 1)
        following = jnp.pad(state.tokens[:, 1:P], ((0, 0), (0, 1)))
        following = jnp.where(jnp.arange(P)[None, :] == last[:, None], pending[:, None], following)
        out, read = self._pass(view, head, state.caches, following, state.features[:, :P], known)

        def expand(
            tokens: Array, parents: Array, positions: Array, ancestors: Array, earlier: NewKV
        ) -> tuple[Array, NewKV]:
            inputs = head.again(embed(view.model, tokens), parents)
            sight = Sight(_layer(state.caches), earlier[0], ancestors, known, None)
            return self._layer_pass(head, inputs, positions, sight)

        passes = Passes(
            expand, lambda out: head.logits(view.model, out), lambda ids: to_target_ids(head, ids)
        )
        tree = grow_tree(passes, out, read, known, last, pending, self.shape)
        starts = kv.ordered_after(known, tree.tokens[:, -1])
        caches = kv.write_every(state.caches, read, starts, view.model.platform)
        return tree, dataclasses.replace(state, caches=caches)

    def truncate(self, state: State, lengths: Int[Array, " B"]) -> State:
        """Slots from there on are unknown again."""
        return dataclasses.replace(state, known=jnp.minimum(state.known, lengths))

    def _joined(
        self,
        state: EagleState,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R C"],
        features: Float[Array, "R C F"],
        waiting: Int[Array, " R"],
    ) -> tuple[Int[Array, "R M"], Float[Array, "R M F"]]:
        """The first ``waiting[r]`` of what waits for a row, and the chunk behind them; M = W + C."""
        W, C = self.window, tokens.shape[1]
        columns = jnp.arange(W + C)[None, :]
        at = jnp.where(columns < waiting[:, None], columns, columns - waiting[:, None] + W)
        at = jnp.clip(at, 0, W + C - 1)
        both = jnp.concatenate([state.tokens[rows], tokens], axis=1)
        wide = jnp.concatenate([state.features[rows], features.astype(state.features.dtype)], axis=1)
        return (
            jnp.take_along_axis(both, at, axis=1),
            jnp.take_along_axis(wide, at[:, :, None], axis=1),
        )

    def _read(
        self,
        view: View,
        state: EagleState,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R M"],
        features: Float[Array, "R M F"],
        begin: Int[Array, " R"],
        counts: Int[Array, " R"],
    ) -> EagleState:
        """One pass over ``counts[r]`` positions from ``begin[r]`` on but the last, which then waits."""
        head, group = self.merge(view), view.group
        caches = state.caches if group is None else (state.caches[group],)
        own = None if group is None else rows - kv.first_row(state.caches, group)
        out, new = self._pass(view, head, caches, tokens[:, 1:], features[:, :-1], begin, own)
        starts = kv.ordered_after(begin, out[:, 0, 0])
        if group is None or own is None:
            written = kv.write_every(state.caches, new, starts, view.model.platform)
        else:
            one = kv.write(caches[0], new, starts, own, view.model.platform)
            written = kv.replace(state.caches, group, one)
        last = jnp.maximum(counts - 1, 0)
        token = jnp.take_along_axis(tokens, last[:, None], axis=1)
        feature = jnp.take_along_axis(features, last[:, None, None], axis=1)
        return EagleState(
            caches=written,
            known=state.known.at[rows].set(begin + last),
            tokens=state.tokens.at[rows, :1].set(token),
            features=state.features.at[rows, :1].set(feature),
        )

    def _pass(
        self,
        view: View,
        head: EagleHead,
        caches: kv.Caches,
        following: Int[Array, "R M"],
        features: Float[Array, "R M F"],
        begin: Int[Array, " R"],
        own: Int[Array, " R"] | None = None,
    ) -> tuple[Float[Array, "R M H"], NewKV]:
        """M slots from ``begin[r]`` on from true features; ``own``: the rows of one group that they are."""
        R, M = following.shape
        inputs = head.features(embed(view.model, following), features)
        causal: Bool[Array, "R M M"] = jnp.broadcast_to(jnp.tril(jnp.ones((1, M, M), bool)), (R, M, M))
        positions = begin[:, None] + jnp.arange(M)[None, :]
        return self._layer_pass(head, inputs, positions, Sight(_layer(caches), None, causal, begin, own))

    def _layer_pass(
        self, head: EagleHead, inputs: tuple[Array, Array], positions: Array, sight: Sight
    ) -> tuple[Array, NewKV]:
        residual, read = inputs
        out, pair = run_block(
            head.layer, residual, rope_tables(self.config.layer, positions), sight, None, read
        )
        return out, (pair,)


def _layer(caches: kv.Caches) -> Any:
    return tuple(cache[0] for cache in caches)
