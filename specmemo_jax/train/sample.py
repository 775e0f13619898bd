"""The target's own answers to many prompts at once, for training data: static batches, plainly decoded.

The engine serves requests as they come and go, and reads prompts row by row. Here a whole batch of prompts is
read in one pass, ends together, and its cache is gone when it does; nothing is planned, nothing is exact to
the engine's bits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.rope import rope_tables
from specmemo_jax.train.products import linear, norm
from specmemo_jax.train.target import TargetWeights, attend_whole, block

BUCKET = 32  # prompts are padded to a multiple of so many tokens
BISECTIONS = 20


class Sampler:
    """``sampler(prompts, max_tokens, temperature, top_p, seed)``: one list of new ids a prompt, the stop id
    that ended it included. ``batch``: prompts decoded together. ``progress`` is called with the prompts done
    and the ids so far.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: TargetWeights,
        stop_ids: Sequence[int],
        batch: int,
        progress: Callable[[int, int], object] = lambda done, ids: None,
    ):
        self.weights, self.batch, self.progress = weights, batch, progress
        self._decode = jax.jit(partial(_decode, config, tuple(stop_ids)), static_argnums=(3,))
        self._stop = set(stop_ids)

    def __call__(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[list[int]]:
        """See the class."""
        width = -(-max(map(len, prompts)) // BUCKET) * BUCKET
        answers: list[list[int]] = []
        total = 0
        for begin in range(0, len(prompts), self.batch):
            some = prompts[begin : begin + self.batch]
            tokens, pads = np.zeros((self.batch, width), np.int32), np.full(self.batch, width, np.int32)
            for row, prompt in enumerate(some):
                tokens[row, width - len(prompt) :], pads[row] = prompt, width - len(prompt)
            key = jax.random.fold_in(jax.random.key(seed), begin)
            settings = jnp.float32(temperature), jnp.float32(top_p)
            found = np.asarray(self._decode(self.weights, tokens, pads, max_tokens, key, settings))
            for row in found[: len(some)].tolist():
                answers.append([token for token in row if token >= 0])
            total += sum(map(len, answers[begin:]))
            self.progress(len(answers), total)
        return answers


def _decode(
    config: LlamaConfig,
    stop_ids: tuple[int, ...],
    weights: TargetWeights,
    tokens: Int[Array, "B P"],
    pads: Int[Array, " B"],
    max_tokens: int,
    key: Array,
    settings: tuple[Array, Array],
) -> Int[Array, "B M"]:
    """New ids ``[B, max_tokens]``, -1 after the end. Prompts end at the right; a row of padding has none."""
    (B, P), dtype, S = tokens.shape, weights.dtype, tokens.shape[1] + max_tokens
    at = jnp.arange(S, dtype=jnp.int32)
    real = at[None, :] >= pads[:, None]
    causal = at[:P, None] >= at[None, :P]
    sees = causal[None] & (real[:, None, :P] | jnp.eye(P, dtype=bool)[None])
    rotary = rope_tables(config, jnp.maximum(at[None, :P] - pads[:, None], 0))

    def fill(x: Array, layer: Any) -> tuple[Array, Any]:
        x, pair = block(config, layer, x, rotary, partial(attend_whole, sees, dtype), dtype)
        room = ((0, 0), (0, 0), (0, max_tokens), (0, 0))
        return x, tuple(jnp.pad(part.transpose(0, 2, 1, 3), room) for part in pair)

    x = weights.embedding[tokens].astype(jnp.float32)
    x, (keys, values) = jax.lax.scan(fill, x, weights.layers)  # [L, B, K, S, D]
    stops = jnp.asarray(stop_ids, jnp.int32)

    def choose(x: Array, n: Array) -> Array:
        hidden = norm(x[:, -1:], weights.norm, config.rms_norm_eps)[:, 0]
        return _chosen(linear(hidden, weights.head, dtype), jax.random.fold_in(key, n), *settings)

    def go_on(state: Any) -> Array:
        n, _, done, *_ = state
        return (n < max_tokens) & ~jnp.all(done)

    def one(state: Any) -> Any:
        n, token, done, out, keys, values = state
        out = jax.lax.dynamic_update_slice(out, jnp.where(done, -1, token)[:, None], (jnp.int32(0), n))
        done = done | jnp.any(token[:, None] == stops[None], axis=1)
        slot = n + jnp.int32(P)
        rotary = rope_tables(config, (slot - pads)[:, None])
        seen = real & (at <= slot)[None]

        def layer(carried: Any, weights_of: Any) -> tuple[Any, None]:
            x, keys, values, i = carried
            attend = partial(_attend_cached, (keys, values), i, slot, seen, dtype)
            x, (keys, values) = block(config, weights_of, x, rotary, attend, dtype)
            return (x, keys, values, i + jnp.int32(1)), None

        x = weights.embedding[token[:, None]].astype(jnp.float32)
        (x, keys, values, _), _ = jax.lax.scan(layer, (x, keys, values, jnp.int32(0)), weights.layers)
        return n + jnp.int32(1), choose(x, n + jnp.int32(1)), done, out, keys, values

    out = jnp.full((B, max_tokens), -1, jnp.int32)
    state = jnp.int32(0), choose(x, jnp.int32(0)), pads >= P, out, keys, values
    return jax.lax.while_loop(go_on, one, state)[3]


def _attend_cached(
    cache: tuple[Array, Array], i: Array, slot: Array, seen: Bool[Array, "B S"], dtype: Any, *qkv: Array
) -> tuple[Array, tuple[Array, Array]]:
    """Attention of one token a row over layer ``i`` of ``cache``, where its key and value are written first.

    As sums and not as products of matrices: those would want a copy of the layer.
    """
    q, *new = qkv
    zero = jnp.int32(0)
    keys, values = (
        jax.lax.dynamic_update_slice(
            held, x.astype(dtype).transpose(0, 2, 1, 3)[None], (i, zero, zero, slot, zero)
        )
        for held, x in zip(cache, new, strict=True)
    )
    k, v = (jax.lax.dynamic_index_in_dim(held, i, 0, False).astype(jnp.float32) for held in (keys, values))
    scores = jnp.sum(q[:, 0, :, :, None] * k[:, :, None], axis=-1)  # [B, K, G, S]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, jnp.float32(-1e30)))
    attended = jnp.sum(weights[..., None] * v[:, :, None], axis=3)
    return attended[:, None], (keys, values)


def _chosen(
    logits: Float[Array, "B V"], key: Array, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, " B"]:
    """The likeliest token of each row at temperature 0, else one drawn of the likeliest ``top_p``."""

    def drawn(logits: Array) -> Array:
        scaled = jax.nn.log_softmax(logits / temperature)
        chances = jnp.exp(scaled)

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = 0.5 * (low + high)
            enough = jnp.sum(jnp.where(scaled >= middle[:, None], chances, 0.0), axis=-1) >= top_p
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        top = jnp.max(scaled, axis=-1)
        low, _ = jax.lax.fori_loop(0, BISECTIONS, halve, (top - 30.0, top))
        kept = jnp.where(scaled >= low[:, None], scaled, -jnp.inf)
        return jax.random.categorical(key, kept, axis=-1).astype(jnp.int32)

    def likeliest(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, drawn, likeliest, logits)
