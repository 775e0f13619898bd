"""The probabilities of tokens that are given, for evaluation: a prefill that keeps every position's logits
for as long as it takes to read them, a few nodes at a time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.decode.step import EngineState
from specmemo_jax.llama import kv
from specmemo_jax.llama.model import by_parts, forward, logits
from specmemo_jax.llama.packing import Target

SCORED_NODES = 8  # whose logits exist at once


def score_chunk(
    target: Target,
    score_nodes: int | None,
    group: int,
    leaves: tuple[Array, ...],
    weights: Any,
    state: EngineState,
    tokens: Int[Array, "1 C"],
    following: Int[Array, "1 C"],
    start: Int[Array, ""],
    row: Int[Array, ""],
) -> tuple[EngineState, tuple[Float[Array, " C"], Bool[Array, " C"]]]:
    """Read C tokens at position ``start`` of ``row``, which is of ``group``; of each token ``following``, its
    log probability there and whether it is the likeliest. Only the cache of the row changes.
    """
    model, cache = target.merge(leaves), state.caches[group]
    C, starts, own = tokens.shape[1], start[None], row[None] - kv.first_row(state.caches, group)
    causal = jnp.tril(jnp.ones((1, C, C), bool))
    positions = starts[:, None] + jnp.arange(C)[None, :]
    hidden, new = forward(
        model, (cache,), tokens, positions, causal, starts, score_nodes=score_nodes, rows=own
    )

    def read(hidden: Array, following: Array) -> Float[Array, "1 P 2"]:
        scores = logits(model, hidden)
        total = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, following[..., None], axis=-1)[..., 0]
        likeliest = jnp.argmax(scores, axis=-1) == following
        return jnp.stack([chosen - total, likeliest.astype(jnp.float32)], axis=-1)

    found = by_parts(read, SCORED_NODES, hidden, following)[0]
    written = kv.write(cache, new, kv.ordered_after(starts, found[-1, 1]), own, target.platform)
    caches = kv.replace(state.caches, group, written)
    return dataclasses.replace(state, caches=caches), (found[:, 0], found[:, 1] > 0)
