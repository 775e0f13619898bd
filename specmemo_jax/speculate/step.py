"""The two programs of the engine as pure functions: prefill a chunk of one row, and one speculative step.

Both take the target's flat weights and a donated `EngineState`, and hand the state back
advanced in place. Nothing in them waits for the host.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specmemo_jax.draft.protocol import Drafter, State, select_row, update_row
from specmemo_jax.llama import kv
from specmemo_jax.llama.kv import Leaf
from specmemo_jax.llama.model import forward, logits
from specmemo_jax.llama.packing import Target
from specmemo_jax.speculate.accept import Accepted, accept_greedy
from specmemo_jax.speculate.tree import ancestor_mask, root_only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What the device knows of each row; ``[B]`` unless said otherwise.

    ``lengths``: committed positions, whose keys and values are in the cache.
    ``pending``: the token at position ``lengths``, emitted but not yet in the cache.
    ``left``: tokens it may still emit. ``stop_ids`` ``[B, E]``: ids that end it, padded
    with -1. ``done``: it emits nothing more and its cache stays as it is.
    """

    lengths: Leaf
    pending: Leaf
    left: Leaf
    stop_ids: Leaf
    done: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """Everything the programs change: the target's cache, the rows and the drafter's own state."""

    cache: kv.KVCache
    rows: Rows
    draft: State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """What one step said: ``tokens[b, :counts[b]]``; ``live[b]``: the row took part in it."""

    tokens: Int[Array, "B P"]
    counts: Int[Array, " B"]
    live: Bool[Array, " B"]


def init_rows(batch: int, max_stop_ids: int) -> Rows:
    """``batch`` empty rows, all done."""
    zeros = jnp.zeros((batch,), jnp.int32)
    return Rows(
        lengths=zeros,
        pending=jnp.zeros_like(zeros),
        left=jnp.zeros_like(zeros),
        stop_ids=jnp.full((batch, max_stop_ids), -1, jnp.int32),
        done=jnp.ones((batch,), bool),
    )


def prefill_chunk(
    target: Target,
    drafter: Drafter | None,
    leaves: tuple[Array, ...],
    state: EngineState,
    tokens: Int[Array, "1 C"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    row: Int[Array, ""],
    max_tokens: Int[Array, ""],
    stop_ids: Int[Array, " E"],
) -> tuple[EngineState, Int[Array, ""]]:
    """Append ``count`` (of C) prompt tokens at position ``start`` of ``row``; return the token that follows.

    Only the last row of logits is computed. The row is ready to decode after its last
    chunk: the returned token is then its first, counted in ``max_tokens``.
    """
    model = target.merge(leaves)
    C = tokens.shape[1]
    starts = start[None]
    cache = state.cache if state.rows.lengths.shape[0] == 1 else select_row(state.cache, row)
    causal = jnp.tril(jnp.ones((1, C, C), bool))
    hidden, new = forward(
        model, cache, tokens, starts[:, None] + jnp.arange(C)[None, :], causal, starts, target.platform
    )
    last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
    first = jnp.argmax(logits(model, last, target.platform)[0, 0]).astype(jnp.int32)
    # ``first >= 0`` always; it ties the write to the end of all reads (see kv.write).
    written = kv.write(state.cache, new, jnp.where(first >= 0, starts, 0), row[None], target.platform)
    left = max_tokens - 1
    rows = state.rows
    rows = Rows(
        lengths=rows.lengths.at[row].set(start + count),
        pending=rows.pending.at[row].set(first),
        left=rows.left.at[row].set(left),
        stop_ids=rows.stop_ids.at[row].set(stop_ids),
        done=rows.done.at[row].set((left <= 0) | jnp.any(stop_ids == first)),
    )
    draft = state.draft
    if drafter is not None:
        part = drafter.observe(select_row(draft, row), tokens, starts, count[None])
        draft = update_row(draft, part, row)
    return EngineState(written, rows, draft), first


def speculative_step(
    target: Target, drafter: Drafter | None, leaves: tuple[Array, ...], state: EngineState
) -> tuple[EngineState, Emitted]:
    """Draft, verify, accept, commit: every row emits between one token and its tree's depth + 1.

    Without a drafter the tree is the root alone, which is plain decoding.
    """
    model, rows = target.merge(leaves), state.rows
    if drafter is None:
        tree, max_depth = root_only(rows.pending), 0
    else:
        tree, max_depth = drafter.propose(state.draft, rows.pending, rows.lengths), drafter.max_depth
    ancestors = ancestor_mask(tree.parents, max_depth)
    positions = rows.lengths[:, None] + tree.depths
    hidden, new = forward(
        model, state.cache, jnp.maximum(tree.tokens, 0), positions, ancestors, rows.lengths, target.platform
    )
    choices = jnp.argmax(logits(model, hidden, target.platform), axis=-1).astype(jnp.int32)
    accepted = accept_greedy(tree, ancestors, choices, max_depth)
    counts, stopped = cut(accepted, rows)
    if drafter is not None and not drafter.is_chain:
        new = jax.tree.map(lambda x: jnp.take_along_axis(x, accepted.path[:, None, :, None], axis=2), new)
    # ``counts >= 0`` always; it ties the write to the end of all reads (see kv.write).
    starts = jnp.where(counts >= 0, rows.lengths, 0)
    cache = kv.write(state.cache, new, starts, jnp.arange(starts.shape[0]), target.platform)
    draft = state.draft
    if drafter is not None:
        committed = jnp.concatenate([rows.pending[:, None], accepted.emitted[:, :-1]], axis=1)
        draft = drafter.observe(draft, committed, rows.lengths, counts)
    last = jnp.take_along_axis(accepted.emitted, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    left = rows.left - counts
    advanced = Rows(
        lengths=rows.lengths + counts,
        pending=jnp.where(counts > 0, last, rows.pending),
        left=left,
        stop_ids=rows.stop_ids,
        done=rows.done | stopped | (left <= 0),
    )
    return EngineState(cache, advanced, draft), Emitted(accepted.emitted, counts, ~rows.done)


def cut(accepted: Accepted, rows: Rows) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """How many of the accepted tokens a row may emit, and whether a stop id ended it.

    Nothing after the first stop id, nothing beyond the row's budget, nothing when done.
    """
    P = accepted.emitted.shape[1]
    columns = jnp.arange(P)[None, :]
    stops = jnp.any(accepted.emitted[:, :, None] == rows.stop_ids[:, None, :], axis=-1)
    allowed = jnp.minimum(accepted.counts, rows.left)
    stops = stops & (columns < allowed[:, None])
    stopped = jnp.any(stops, axis=1) & ~rows.done
    counts = jnp.where(stopped, jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, allowed)
    return jnp.where(rows.done, 0, counts), stopped
