"""The two programs of the engine as pure functions: prefill a chunk of one row, and one speculative step.

Both take the target's flat weights, the drafter's weights and a donated `EngineState`, and
hand the state back advanced in place. Nothing in them waits for the host. ``sampled`` chooses,
when they are traced, between the argmax of the logits and `sampling.choose`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specmemo_jax.draft.protocol import Drafter, State, View
from specmemo_jax.llama import kv
from specmemo_jax.llama.model import Llama, forward, logits
from specmemo_jax.llama.packing import Target
from specmemo_jax.speculate.accept import Accepted, accept_greedy, accept_sampled
from specmemo_jax.speculate.rows import Rows, Settings, advance
from specmemo_jax.speculate.sampling import History, choose, remember
from specmemo_jax.speculate.tree import Tree, ancestor_mask, root_only


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


def prefill_chunk(
    target: Target,
    drafter: Drafter | None,
    sampled: bool,
    leaves: tuple[Array, ...],
    weights: Any,
    state: EngineState,
    tokens: Int[Array, "1 C"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    row: Int[Array, ""],
    settings: Settings,
) -> tuple[EngineState, Int[Array, ""]]:
    """Append ``count`` (of C) prompt tokens at position ``start`` of ``row``; return the token that follows.

    Only the last row of logits is computed. The row is ready to decode after its last
    chunk: the returned token is then its first, counted in ``settings.left``. A chunk at
    position 0 starts the row anew.
    """
    model = target.merge(leaves)
    C, B = tokens.shape[1], state.rows.lengths.shape[0]
    starts, rows = start[None], row[None]
    cache = kv.select_rows(state.cache, rows)
    causal = jnp.tril(jnp.ones((1, C, C), bool))
    hidden, new = forward(
        model, cache, tokens, starts[:, None] + jnp.arange(C)[None, :], causal, starts, target.platform
    )
    last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
    scores = logits(model, last, target.platform)[:, 0]
    history = _read(state.rows.history, tokens, start, count, row)
    if sampled:
        settings_row = jax.tree.map(lambda x: x[None], settings)
        mine = jax.tree.map(lambda x: x[row][None], history)
        first = choose(scores, settings_row.sampling, mine, settings_row.stop_ids, starts + count)[0]
        history = remember(history, jnp.full((B,), first), jnp.arange(B) == row)
    else:
        first = jnp.argmax(scores[0]).astype(jnp.int32)
    # ``first >= 0`` always; it ties the write to the end of all reads (see kv.write).
    written = kv.write(state.cache, new, jnp.where(first >= 0, starts, 0), rows, target.platform)
    settings = dataclasses.replace(settings, left=settings.left - 1)
    advanced = Rows(
        lengths=state.rows.lengths.at[row].set(start + count),
        pending=state.rows.pending.at[row].set(first),
        done=state.rows.done.at[row].set((settings.left <= 0) | jnp.any(settings.stop_ids == first)),
        settings=jax.tree.map(lambda whole, mine: whole.at[row].set(mine), state.rows.settings, settings),
        history=history,
    )
    draft = state.draft
    if drafter is not None:
        view = View(weights, model, state.cache, target.platform)
        draft = drafter.observe(view, draft, rows, tokens, starts, count[None])
    return EngineState(written, advanced, draft), first


def _read(
    history: History,
    tokens: Int[Array, "1 C"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    row: Int[Array, ""],
) -> History:
    """Mark a prompt's chunk as seen; nothing of an answer is, and the first chunk wipes the row."""
    V, C = history.seen.shape[1], tokens.shape[1]
    prompt = history.seen[row] & (start > 0).astype(jnp.int32)
    prompt = prompt.at[jnp.where(jnp.arange(C) < count, tokens[0], V)].set(1, mode="drop")
    return History(history.seen.at[row].set(prompt), history.recent.at[row].set(-1))


def speculative_step(
    target: Target,
    drafter: Drafter | None,
    sampled: bool,
    leaves: tuple[Array, ...],
    weights: Any,
    state: EngineState,
) -> tuple[EngineState, Emitted]:
    """Draft, verify, accept, commit: every row emits between one token and its tree's depth + 1.

    Without a drafter the tree is the root alone, which is plain decoding.
    """
    model, rows, draft = target.merge(leaves), state.rows, state.draft
    view = View(weights, model, state.cache, target.platform)
    if drafter is None:
        tree, max_depth, widths, is_chain = root_only(rows.pending), 0, (1,), True
    else:
        tree, draft = drafter.propose(view, draft, rows.pending, rows.lengths)
        max_depth, widths, is_chain = drafter.max_depth, drafter.widths, drafter.is_chain
    verifiers = [_verifier(model, target.platform, sampled, is_chain, max_depth, width) for width in widths]
    if len(verifiers) == 1:
        accepted, new, history = verifiers[0](tree, rows, state.cache)
    else:
        filled = jnp.where((tree.tokens >= 0) & ~rows.done[:, None], jnp.arange(widths[-1])[None, :] + 1, 1)
        place = jnp.sum(jnp.max(filled) > jnp.asarray(widths[:-1], jnp.int32))
        accepted, new, history = jax.lax.switch(place, verifiers, tree, rows, state.cache)
    advanced, counts = advance(rows, accepted, history)
    # ``counts >= 0`` always; it ties the write to the end of all reads (see kv.write).
    starts = jnp.where(counts >= 0, rows.lengths, 0)
    every = jnp.arange(starts.shape[0])
    cache = kv.write(state.cache, new, starts, every, target.platform)
    if drafter is not None:
        committed = jnp.concatenate([rows.pending[:, None], accepted.emitted[:, :-1]], axis=1)
        draft = drafter.observe(view, draft, every, committed, rows.lengths, counts)
    return EngineState(cache, advanced, draft), Emitted(accepted.emitted, counts, ~rows.done)


def _verifier(
    model: Llama, platform: str, sampled: bool, is_chain: bool, max_depth: int, width: int
) -> Callable[[Tree, Rows, kv.KVCache], tuple[Accepted, kv.NewKV, History]]:
    """Verification of a tree's first ``width`` nodes: the accepted path, its keys and values, the history.

    All results are as wide as the deepest tree's path, so that every width's are alike.
    """
    depth = min(max_depth, width - 1)

    def verify(tree: Tree, rows: Rows, cache: kv.KVCache) -> tuple[Accepted, kv.NewKV, History]:
        tree = jax.tree.map(lambda x: x[:, :width], tree)
        ancestors = ancestor_mask(tree.parents, depth)
        tokens, positions = jnp.maximum(tree.tokens, 0), rows.lengths[:, None] + tree.depths
        hidden, new = forward(model, cache, tokens, positions, ancestors, rows.lengths, platform)
        scores, history = logits(model, hidden, platform), rows.history
        if sampled:
            sampling, stop_ids = rows.settings.sampling, rows.settings.stop_ids
            accepted, history = accept_sampled(
                tree, scores, sampling, history, stop_ids, rows.lengths, ~rows.done, depth
            )
        else:
            accepted = accept_greedy(tree, ancestors, jnp.argmax(scores, axis=-1).astype(jnp.int32), depth)
        if not is_chain:
            at = accepted.path[:, None, :, None]
            new = jax.tree.map(lambda x: jnp.take_along_axis(x, at, axis=2), new)
        more = max_depth - depth
        new = jax.tree.map(lambda x: jnp.pad(x[:, :, : depth + 1], ((0, 0), (0, 0), (0, more), (0, 0))), new)
        path, emitted = (jnp.pad(x, ((0, 0), (0, more))) for x in (accepted.path, accepted.emitted))
        return Accepted(path, emitted, accepted.counts), new, history

    return verify
