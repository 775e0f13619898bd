"""How far a head is from its target, over all unrolled steps, and how often it is right."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specmemo_jax.draft.head_config import HeadConfig
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.rope import rope_tables
from specmemo_jax.train import heads
from specmemo_jax.train.heads import Params, shifted
from specmemo_jax.train.judge import LossKind, judged
from specmemo_jax.train.products import linear
from specmemo_jax.train.target import TargetWeights, likeliest, read

DECAY = 0.8  # an unrolled step's weight over the one's before it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows: ``tokens`` ``[B, T]``; ``segments``, each conversation's own number within its row, 0 is
    padding; ``answers``, the tokens that the target wrote.
    """

    tokens: Array
    segments: Array
    answers: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """``ids`` ``[Vd]``: the draft vocabulary's target ids. ``places`` ``[V]``: their inverse, else -1."""

    ids: Array
    places: Array


def positions_of(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Each token's position within its conversation."""
    at = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None], segments.shape)
    fresh = segments != shifted(segments, 1)
    return at - jax.lax.cummax(jnp.where(fresh, at, jnp.int32(0)), axis=1)


def sight(segments: Int[Array, "B T"], behind: int) -> Bool[Array, "B T T"]:
    """Which slots a slot sees: of its own conversation, and at least ``behind`` slots before it."""
    at = jnp.arange(segments.shape[1], dtype=jnp.int32)
    causal = at[:, None] - jnp.int32(behind) >= at[None, :]
    return causal[None] & (segments[:, :, None] == segments[:, None, :])


@dataclasses.dataclass(frozen=True)
class Objective:
    """``steps``: unrolled steps, or Medusa's heads. ``feature_weight``, ``token_weight``: of EAGLE's smooth
    L1 loss of features and of the loss of tokens (``kind``). ``dtype``: what products are computed in.
    """

    steps: int
    kind: LossKind
    dtype: Any
    feature_weight: float = 0.0
    token_weight: float = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """What a batch is to a head, by slot: its token's embedding ``[B, T, H]``, the target's features
    ``[B, T, F]``, its last hidden state one token later ``[B, T, H]``, its logits there over the draft
    vocabulary ``[B, T, Vd]``, and its greedy token there as a draft id, -1 outside ``[B, T]``.
    """

    embedded: Array
    features: Array
    next_hidden: Array
    labels: Array
    best: Array


def read_target(
    config: LlamaConfig, weights: TargetWeights, vocabulary: Vocabulary, taps: tuple[int, ...], rows: Rows
) -> Reading:
    """One pass of the frozen target."""
    positions, sees = positions_of(rows.segments), sight(rows.segments, 0)
    features, final = read(config, weights, rows.tokens, positions, sees, taps)
    later = shifted(final, -1)
    return Reading(
        embedded=weights.embedding[shifted(rows.tokens, -1)],
        features=features,
        next_hidden=later,
        labels=linear(later, weights.head[vocabulary.ids], weights.dtype),
        best=vocabulary.places[shifted(likeliest(weights, final), -1)],
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """``losses`` ``[steps]``: of each depth. ``tried``, ``right`` ``[steps]``: chains, from every position,
    that came to a depth with all former tokens right, and those right there, too. ``walks``, ``walked``:
    steps of decoding with a greedy chain, each from where the last one ended, and the tokens they brought.
    """

    losses: Array
    tried: Array
    right: Array
    walks: Array
    walked: Array


def total_loss(
    head: HeadConfig,
    objective: Objective,
    params: Params,
    target_rows: Array,
    reading: Reading,
    rows: Rows,
) -> tuple[Array, Outcome]:
    """What is minimised, and what came of it. ``target_rows`` ``[Vd, H]``: the target's head for the draft
    vocabulary, used where the head brings no rows of its own.
    """
    each = _medusa if head.kind == "medusa" else _unrolled
    losses, tried, right, alive = [], [], [], None
    accepted = jnp.zeros(rows.tokens.shape, jnp.int32)
    for loss, valid, hit in each(head, objective, params, target_rows, reading, rows):
        alive = valid if alive is None else alive & valid
        losses.append(loss)
        tried.append(jnp.sum(alive, dtype=jnp.int32))
        alive = alive & hit
        right.append(jnp.sum(alive, dtype=jnp.int32))
        accepted = accepted + alive.astype(jnp.int32)
    stacked = jnp.stack(losses)
    decay = jnp.asarray([DECAY**i for i in range(len(losses))], jnp.float32)
    # An answer's first token is prefill's, so the first step starts from it.
    starts = _valid(rows, 0) & shifted(rows.answers, -1)
    outcome = Outcome(stacked, jnp.stack(tried), jnp.stack(right), *walk(starts, accepted))
    return jnp.sum(stacked * decay), outcome


def walk(starts: Bool[Array, "B T"], accepted: Int[Array, "B T"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Steps that decoding takes through the slots ``starts`` of each row, and their tokens: where one begins
    it brings the ``accepted`` and one more, and the next one begins after those. Not every slot begins one,
    so that the mean over all slots would promise more: where much is accepted, fewer steps begin.
    """

    def one(left: Array, slot: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        here, length = slot
        begins = here & (left == none)
        left = jnp.where(begins, length, jnp.maximum(left - one_slot, none))
        return jnp.where(here, left, none), (begins, jnp.where(begins, length + one_slot, none))

    none, one_slot = jnp.int32(0), jnp.int32(1)
    zero = jnp.zeros(starts.shape[:1], jnp.int32)
    _, (begun, tokens) = jax.lax.scan(one, zero, (starts.T, accepted.T))
    return jnp.sum(begun, dtype=jnp.int32), jnp.sum(tokens, dtype=jnp.int32)


def _valid(rows: Rows, later: int) -> Array:
    """Chains, by the slot that they start from, whose token at depth ``later`` is an answer's."""
    there = (shifted(x, -2 - later) for x in (rows.segments, rows.answers))
    segment, answer = there
    first = shifted(rows.answers, -2)
    return first & answer & (segment == rows.segments) & (segment > 0)


def _unrolled(
    head: HeadConfig, objective: Objective, params: Params, target_rows: Array, reading: Reading, rows: Rows
) -> Iterator[tuple[Array, Array, Array]]:
    """Depth by depth: the loss, which chains (by their first slot) reach it, and which are right there."""
    dtype, flat = objective.dtype, (-1, reading.embedded.shape[-1])
    table = params["lm_head.weight"] if head.own_lm_head else target_rows
    labels, best = reading.labels.reshape(-1, reading.labels.shape[-1]), reading.best.reshape(-1)
    rotary = rope_tables(head.layer, positions_of(rows.segments))
    step = jax.checkpoint(partial(heads.step, head, dtype=dtype))
    state, past = heads.first_state(head, params, reading.features, dtype), ()
    for i in range(objective.steps):
        out, own = step(params, reading.embedded, state, rotary, sight(rows.segments, i), past)
        valid = _valid(rows, i)
        weights = shifted(valid, i).astype(jnp.float32)
        weights = weights / jnp.maximum(jnp.sum(weights), 1.0)
        hidden = heads.scored(head, params, out).astype(dtype)
        loss, hit, _ = judged(
            hidden.reshape(flat), table, labels, best, weights.reshape(-1), objective.kind, dtype
        )
        loss = objective.token_weight * loss
        if objective.feature_weight:
            off = jnp.abs(out - reading.next_hidden.astype(jnp.float32))
            smooth = jnp.where(off < 1, 0.5 * jnp.square(off), off - 0.5)
            loss = loss + objective.feature_weight * jnp.sum(weights * jnp.mean(smooth, axis=-1))
        yield loss, valid, shifted(hit.reshape(valid.shape), -i)
        state, past = shifted(out.astype(dtype), 1), (*past, own)


def _medusa(
    head: HeadConfig, objective: Objective, params: Params, target_rows: Array, reading: Reading, rows: Rows
) -> Iterator[tuple[Array, Array, Array]]:
    """As `_unrolled`: head i foretells what is i + 2 tokens after its slot."""
    dtype, flat = objective.dtype, (-1, reading.features.shape[-1])
    for i in range(head.num_heads):
        valid = _valid(rows, i)
        weights = valid.astype(jnp.float32) / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)
        hidden = jax.checkpoint(heads.medusa_state, static_argnums=(1, 3))(params, i, reading.features, dtype)
        table = params[f"{i}.1.weight"] if head.own_lm_head else target_rows
        labels = shifted(reading.labels, -i).reshape(-1, reading.labels.shape[-1])
        best = shifted(reading.best, -i).reshape(-1)
        hidden = hidden.astype(dtype).reshape(flat)
        loss, hit, _ = judged(hidden, table, labels, best, weights.reshape(-1), objective.kind, dtype)
        yield objective.token_weight * loss, valid, hit.reshape(valid.shape)
