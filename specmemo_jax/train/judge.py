"""A head's scores against the target's, a chunk of positions at a time, forward and backward."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.train.products import chunk_size, linear

LossKind = Literal["kl", "lk"]
CHUNK = 4096  # positions whose scores exist at once


def _forward_alone(
    hidden: Array, table: Array, labels: Array, best: Array, weights: Array, kind: LossKind, dtype: Any
) -> tuple[Array, Array, Array]:
    chunks = _chunks(hidden, labels, best, weights)
    losses, right, accepted = jax.lax.map(
        lambda c: _chunk(c[0], table, *c[1:], kind=kind, dtype=dtype), chunks
    )
    return jnp.sum(losses), right.reshape(-1), accepted.reshape(-1)


def _chunks(*arrays: Array) -> tuple[Array, ...]:
    size = chunk_size(arrays[0].shape[0], CHUNK)
    return tuple(x.reshape(-1, size, *x.shape[1:]) for x in arrays)


def _chunk(
    hidden: Array,
    table: Array,
    labels: Array,
    best: Array,
    weights: Array,
    *,
    kind: LossKind,
    dtype: Any,
) -> tuple[Array, Array, Array]:
    scores = linear(hidden, table, dtype)
    q, p = jax.nn.log_softmax(scores), jax.nn.log_softmax(labels)
    likely = jnp.exp(p)
    accepted = jnp.sum(jnp.minimum(likely, jnp.exp(q)), axis=-1)
    losses = jnp.sum(likely * (p - q), axis=-1)
    if kind == "lk":
        share = jax.lax.stop_gradient(jnp.exp(-3 * accepted))
        losses = share * losses + (1 - share) * (1 - accepted)
    right = jnp.argmax(scores, axis=-1).astype(jnp.int32) == best
    return jnp.sum(losses * weights), right, accepted


def _judged_forward(
    hidden: Array, table: Array, labels: Array, best: Array, weights: Array, kind: LossKind, dtype: Any
) -> tuple[Any, Any]:
    def one(to_table: Array, chunk: Any) -> tuple[Array, Any]:
        x, *rest = chunk

        def loss(x: Array, table: Array) -> tuple[Array, Any]:
            total, *seen = _chunk(x, table, *rest, kind=kind, dtype=dtype)
            return total, tuple(seen)

        (total, seen), (to_x, to_rows) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, table)
        return to_table + to_rows.astype(jnp.float32), (total, *seen, to_x.astype(dtype))

    start = jnp.zeros(table.shape, jnp.float32)
    to_table, (totals, right, accepted, to_hidden) = jax.lax.scan(
        one, start, _chunks(hidden, labels, best, weights)
    )
    out = jnp.sum(totals), right.reshape(-1), accepted.reshape(-1)
    return out, (to_hidden.reshape(hidden.shape), to_table, jnp.zeros((), hidden.dtype), table)


def _judged_backward(kind: LossKind, dtype: Any, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    to_hidden, to_table, like, table = kept
    by = cotangents[0]
    to_hidden = (to_hidden.astype(jnp.float32) * by).astype(like.dtype)
    return to_hidden, (to_table * by).astype(table.dtype), None, None, None


_judged: Any = jax.custom_vjp(_forward_alone, nondiff_argnums=(5, 6))
_judged.defvjp(_judged_forward, _judged_backward)


def judged(
    hidden: Float[Array, "R H"],
    table: Float[Array, "Vd H"],
    labels: Float[Array, "R Vd"],
    best: Int[Array, " R"],
    weights: Float[Array, " R"],
    kind: LossKind,
    dtype: Any,
) -> tuple[Float[Array, ""], Bool[Array, " R"], Float[Array, " R"]]:
    """Weighted sum of the losses, whether each row's likeliest token is ``best``, and its acceptance
    ``sum(min(p, q))``.

    ``labels``: the target's logits over the draft vocabulary. Scores exist for `CHUNK` rows at a time, with
    their gradient: where it is asked for, it is taken in the forward pass.
    """
    return _judged(hidden, table, labels, best, weights, kind, dtype)
