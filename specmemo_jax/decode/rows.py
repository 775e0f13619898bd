"""What the device knows of each row, and what one request sets there."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specmemo_jax.decode.accept import Accepted
from specmemo_jax.decode.sampling import History, Sampling, empty_history, greedy_sampling
from specmemo_jax.llama.kv import Leaf

MAX_STOP_IDS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """One request's own: ``left`` tokens it may emit, the ``stop_ids`` ``[E]`` that end it (padded
    with -1), and its `Sampling`. Every leaf lacks `Rows`' batch axis.
    """

    left: Leaf
    stop_ids: Leaf
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """``[B]`` unless said otherwise.

    ``lengths``: committed positions, whose keys and values are in the cache.
    ``pending``: the token at position ``lengths``, emitted but not yet in the cache.
    ``done``: it emits nothing more and its cache stays as it is.
    ``settings``: each row's, `Settings` with the batch axis in front.
    """

    lengths: Leaf
    pending: Leaf
    done: Leaf
    settings: Settings
    history: History


def init_rows(batch: int, vocab_size: int) -> Rows:
    """Rows that are all empty and done."""
    return Rows(
        lengths=jnp.zeros((batch,), jnp.int32),
        pending=jnp.zeros((batch,), jnp.int32),
        done=jnp.ones((batch,), bool),
        settings=Settings(
            left=jnp.zeros((batch,), jnp.int32),
            stop_ids=jnp.full((batch, MAX_STOP_IDS), -1, jnp.int32),
            sampling=greedy_sampling(batch),
        ),
        history=empty_history(batch, vocab_size),
    )


def truncate_at_stop(accepted: Accepted, rows: Rows) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """How many of the accepted tokens a row may emit, and whether a stop id ended it.

    Nothing after the first stop id, nothing beyond the row's budget, nothing when done.
    """
    columns = jnp.arange(accepted.emitted.shape[1])[None, :]
    stops = jnp.any(accepted.emitted[:, :, None] == rows.settings.stop_ids[:, None, :], axis=-1)
    allowed = jnp.minimum(accepted.counts, rows.settings.left)
    stops = stops & (columns < allowed[:, None])
    stopped = jnp.any(stops, axis=1) & ~rows.done
    counts = jnp.where(stopped, jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, allowed)
    return jnp.where(rows.done, 0, counts), stopped


def advance(rows: Rows, accepted: Accepted, history: History) -> tuple[Rows, Int[Array, " B"]]:
    """The rows after a step, and how many tokens each emitted."""
    counts, stopped = truncate_at_stop(accepted, rows)
    last = jnp.take_along_axis(accepted.emitted, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    left = rows.settings.left - counts
    advanced = Rows(
        lengths=rows.lengths + counts,
        pending=jnp.where(counts > 0, last, rows.pending),
        done=rows.done | stopped | (left <= 0),
        settings=dataclasses.replace(rows.settings, left=left),
        history=history,
    )
    return advanced, counts
