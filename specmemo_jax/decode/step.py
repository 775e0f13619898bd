"""The two programs of the engine as pure functions: prefill a chunk of one row, and one speculative step.

Both take the target's flat weights, the drafter's weights and a donated `EngineState`, and
hand the state back advanced in place. Nothing in them waits for the host. ``sampled`` chooses,
when they are traced, between the argmax of the logits and `sampling.choose`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specmemo_jax.decode.accept import Accepted, accept_greedy, accept_sampled
from specmemo_jax.decode.emitted import Emitted, append
from specmemo_jax.decode.rows import Rows, Settings, advance
from specmemo_jax.decode.sampling import History, choose, likeliest, remember
from specmemo_jax.decode.unbounded import choices_by_path, last_of_all_logits
from specmemo_jax.draft.protocol import Drafter, State, TreeLimits, View
from specmemo_jax.draft.tree import Tree, ancestor_mask, root_only
from specmemo_jax.llama import kv
from specmemo_jax.llama.model import Llama, by_parts, forward_with_taps, logits
from specmemo_jax.llama.packing import Target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """Everything the programs change: the target's cache, the rows, the drafter's own state, and what the
    last steps said.
    """

    caches: kv.Caches
    rows: Rows
    draft: State
    emitted: Emitted


@dataclasses.dataclass(frozen=True)
class Chunking:
    """Which intermediate results exist at once.

    ``score_nodes``, ``logit_nodes``: the most nodes whose attention scores, and whose logits, do; None
    for all. Fewer cost reading the cache, or the head, once more a part. ``prompt_logits`` and
    ``path_logits`` are what the unbounded baseline allocates (`specmemo_jax.decode.unbounded`).
    """

    score_nodes: int | None = None
    logit_nodes: int | None = None
    prompt_logits: bool = False
    path_logits: bool = False


def prefill_chunk(
    target: Target,
    drafter: Drafter | None,
    chunking: Chunking,
    sampled: bool,
    group: int,
    leaves: tuple[Array, ...],
    weights: Any,
    state: EngineState,
    tokens: Int[Array, "1 C"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    row: Int[Array, ""],
    settings: Settings,
) -> tuple[EngineState, Int[Array, ""]]:
    """Append ``count`` (of C) prompt tokens at position ``start`` of ``row``, which is of ``group``; return
    the token that follows.

    Only the last row of logits is computed. The row is ready to decode after its last
    chunk: the returned token is then its first, counted in ``settings.left``. A chunk at
    position 0 starts the row anew.
    """
    model = target.merge(leaves)
    C, B = tokens.shape[1], state.rows.lengths.shape[0]
    starts, rows = start[None], row[None]
    own, cache = rows - kv.first_row(state.caches, group), state.caches[group]
    causal = jnp.tril(jnp.ones((1, C, C), bool))
    positions = starts[:, None] + jnp.arange(C)[None, :]
    hidden, new, features = forward_with_taps(
        model,
        (cache,),
        tokens,
        positions,
        causal,
        starts,
        taps_of(drafter),
        score_nodes=chunking.score_nodes,
        rows=own,
    )
    if chunking.prompt_logits:
        scores = last_of_all_logits(model, hidden, count)
    else:
        last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
        scores = logits(model, last)[:, 0]
    history = _mark_seen(state.rows.history, tokens, start, count, row)
    if sampled:
        settings_row = jax.tree.map(lambda x: x[None], settings)
        mine = jax.tree.map(lambda x: x[row][None], history)
        first = choose(scores, settings_row.sampling, mine, settings_row.stop_ids, starts + count)[0]
        history = remember(history, jnp.full((B,), first), jnp.arange(B) == row)
    else:
        first = likeliest(scores)[0]
    written = kv.write(cache, new, kv.ordered_after(starts, first), own, target.platform)
    caches = kv.replace(state.caches, group, written)
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
        view = View(weights, model, state.caches, group, features)
        draft = drafter.observe(view, draft, rows, tokens, starts, count[None])
    return EngineState(caches, advanced, draft, state.emitted), first


def _mark_seen(
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
    observer: Drafter | None,
    chunking: Chunking,
    sampled: bool,
    record: bool,
    leaves: tuple[Array, ...],
    weights: Any,
    state: EngineState,
) -> tuple[EngineState, Tree | None]:
    """Draft, verify, accept, commit: every row emits between one token and its tree's depth + 1. Returns the
    proposed tree where it is to be recorded.

    Without a drafter the tree is the root alone, which is plain decoding. ``observer``: the drafter, or None
    where it need not see this step, and its state passes through.
    """
    model, rows, draft = target.merge(leaves), state.rows, state.draft
    view, taps = View(weights, model, state.caches), taps_of(observer)
    limits = TreeLimits.of(drafter)
    if drafter is None:
        tree = root_only(rows.pending)
    else:
        tree, draft = drafter.propose(view, draft, rows.pending, rows.lengths)
    buckets = limits.verify_buckets
    verifiers = [_verifier(model, chunking, sampled, limits, taps, width) for width in buckets]
    if len(verifiers) == 1:
        accepted, new, features, history = verifiers[0](tree, rows, state.caches)
    else:
        filled = jnp.where((tree.tokens >= 0) & ~rows.done[:, None], jnp.arange(buckets[-1])[None, :] + 1, 1)
        place = jnp.sum(jnp.max(filled) > jnp.asarray(buckets[:-1], jnp.int32))
        accepted, new, features, history = jax.lax.switch(place, verifiers, tree, rows, state.caches)
    advanced, counts = advance(rows, accepted, history)
    caches = kv.write_every(state.caches, new, kv.ordered_after(rows.lengths, counts), target.platform)
    if observer is not None:
        committed = jnp.concatenate([rows.pending[:, None], accepted.emitted[:, :-1]], axis=1)
        view, every = dataclasses.replace(view, features=features), jnp.arange(counts.shape[0])
        draft = observer.observe(view, draft, every, committed, rows.lengths, counts)
    emitted = append(state.emitted, accepted.emitted, counts, ~rows.done)
    return EngineState(caches, advanced, draft, emitted), tree if record else None


def catch_up(
    target: Target,
    drafter: Drafter,
    group: int,
    leaves: tuple[Array, ...],
    weights: Any,
    state: EngineState,
    tokens: Int[Array, "1 C"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    row: Int[Array, ""],
) -> tuple[EngineState, None]:
    """Tell a drafter that slept ``count`` (of C) committed tokens of ``row``, from position ``start``."""
    view = View(weights, target.merge(leaves), state.caches, group)
    draft = drafter.observe(view, state.draft, row[None], tokens, start[None], count[None])
    return dataclasses.replace(state, draft=draft), None


def settle(
    target: Target, drafter: Drafter, leaves: tuple[Array, ...], weights: Any, state: EngineState
) -> tuple[EngineState, None]:
    """Let a drafter with taps read what plain steps left (`Drafter.settle`)."""
    view = View(weights, target.merge(leaves), state.caches)
    return dataclasses.replace(state, draft=drafter.settle(view, state.draft, state.rows.lengths)), None


def taps_of(drafter: Drafter | None) -> tuple[int, ...]:
    """What is read of the target for a drafter; nothing without one."""
    return () if drafter is None else drafter.taps


def restore(
    leaves: tuple[Array, ...],
    weights: Any,
    state: EngineState,
    row: Int[Array, ""],
    length: Int[Array, ""],
    pending: Int[Array, ""],
    settings: Settings,
    seen: Int[Array, " V"],
    recent: Int[Array, " M"],
) -> tuple[EngineState, None]:
    """Set what the device knows of ``row``, whose first ``length`` positions are in the cache."""
    rows = state.rows
    history = History(rows.history.seen.at[row].set(seen), rows.history.recent.at[row].set(recent))
    restored = Rows(
        lengths=rows.lengths.at[row].set(length),
        pending=rows.pending.at[row].set(pending),
        done=rows.done.at[row].set(settings.left <= 0),
        settings=jax.tree.map(lambda whole, mine: whole.at[row].set(mine), rows.settings, settings),
        history=history,
    )
    return dataclasses.replace(state, rows=restored), None


def end(
    leaves: tuple[Array, ...], weights: Any, state: EngineState, row: Int[Array, ""]
) -> tuple[EngineState, None]:
    """The row emits nothing more."""
    done = state.rows.done.at[row].set(True)
    return dataclasses.replace(state, rows=dataclasses.replace(state.rows, done=done)), None


def move(
    drafter: Drafter | None,
    platform: str,
    source_group: int,
    target_group: int,
    leaves: tuple[Array, ...],
    weights: Any,
    state: EngineState,
    source: Int[Array, ""],
    target: Int[Array, ""],
) -> tuple[EngineState, None]:
    """Copy row ``source``, live, to row ``target`` of a wider group, where it goes on; ``source`` is done."""
    at, to = (source_group, source), (target_group, target)
    caches = kv.move_row(state.caches, at, to, platform)
    rows = jax.tree.map(lambda x: x.at[target].set(x[source]), state.rows)
    done = rows.done.at[target].set(False).at[source].set(True)
    draft = state.draft
    if drafter is not None:
        draft = drafter.move(draft, at, to, platform)
    return EngineState(caches, dataclasses.replace(rows, done=done), draft, state.emitted), None


def _verifier(
    model: Llama, chunking: Chunking, sampled: bool, limits: TreeLimits, taps: tuple[int, ...], width: int
) -> Callable[[Tree, Rows, kv.Caches], tuple[Accepted, kv.NewKV, Array | None, History]]:
    """Verification of a tree's first ``width`` nodes: the accepted path, its keys and values, its features
    at ``taps`` (None without), the history.

    All results are as wide as the deepest tree's path, so that every width's are alike.
    """
    depth = min(limits.max_depth, width - 1)

    def verify(tree: Tree, rows: Rows, caches: kv.Caches) -> tuple[Accepted, kv.NewKV, Array | None, History]:
        tree = jax.tree.map(lambda x: x[:, :width], tree)
        ancestors = ancestor_mask(tree.parents, depth)
        tokens, positions = jnp.maximum(tree.tokens, 0), rows.lengths[:, None] + tree.depths
        hidden, new, features = forward_with_taps(
            model,
            caches,
            tokens,
            positions,
            ancestors,
            rows.lengths,
            taps,
            score_nodes=chunking.score_nodes,
        )
        history = rows.history
        if sampled:
            logits_at = _logits_at(model, hidden, chunking.logit_nodes)
            sampling, stop_ids = rows.settings.sampling, rows.settings.stop_ids
            accepted, history = accept_sampled(
                tree, logits_at, sampling, history, stop_ids, rows.lengths, ~rows.done, depth
            )
        elif chunking.path_logits:
            scores = logits(model, hidden)
            choices = choices_by_path(tree, ancestors, scores, depth, limits.max_leaves)
            accepted = accept_greedy(tree, ancestors, choices, depth)
        else:
            choices = by_parts(partial(_likeliest, model), chunking.logit_nodes, hidden)
            accepted = accept_greedy(tree, ancestors, choices, depth)
        if not limits.is_chain:
            at = accepted.path[:, None, :, None]
            new = jax.tree.map(lambda x: jnp.take_along_axis(x, at, axis=2), new)
        more = limits.max_depth - depth
        if features is not None:
            features = jnp.take_along_axis(features, accepted.path[:, :, None], axis=1)
            features = jnp.pad(features, ((0, 0), (0, more), (0, 0)))
        new = jax.tree.map(lambda x: jnp.pad(x[:, :, : depth + 1], ((0, 0), (0, 0), (0, more), (0, 0))), new)
        path, emitted = (jnp.pad(x, ((0, 0), (0, more))) for x in (accepted.path, accepted.emitted))
        return Accepted(path, emitted, accepted.counts), new, features, history

    return verify


def _likeliest(model: Llama, hidden: Float[Array, "B T H"]) -> Int[Array, "B T"]:
    scores = logits(model, hidden)
    with jax.named_scope("choose"):
        return likeliest(scores)


def _logits_at(
    model: Llama, hidden: Float[Array, "B T H"], logit_nodes: int | None
) -> Callable[[Int[Array, " B"]], Float[Array, "B V"]]:
    """Logits of a node a row: all computed at once, or each when asked for."""
    if logit_nodes is None or logit_nodes >= hidden.shape[1]:
        every = logits(model, hidden)
        return lambda node: jnp.take_along_axis(every, node[:, None, None], axis=1)[:, 0]

    def visit(node: Int[Array, " B"]) -> Float[Array, "B V"]:
        return logits(model, jnp.take_along_axis(hidden, node[:, None, None], axis=1))[:, 0]

    return visit
