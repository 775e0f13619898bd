"""One token a row from a row of logits: penalties, filters and seeded noise, nothing sorted.

The noise belongs to (seed, absolute position, token) and not to the tree, the batch or the
step, so that a row's tokens are the same whatever is speculated around them. Adding Gumbel
noise to logits and taking the largest is a draw from their softmax (Maddison et al. 2014,
arXiv 1411.0030); among filtered tokens it is a draw from the filtered softmax.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specmemo_jax.llama.kv import Leaf

BANNED = -jnp.inf
MAX_BAD_WORDS = (16, 8)  # token sequences a row, and tokens of the longest
OUTPUT = 2  # `History.seen` counts a token of the answer by this much; 1 says that the prompt has it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each row's tokens are chosen; ``[B]`` unless said otherwise.

    Meanings as in `specmemo_jax.SamplingParams`, with ``temperature`` 0 for greedy and ``top_k``
    V or more for all. ``key`` ``[B, 2]``: the seed's 64 bits. ``min_length``: no stop id stands
    before this position. ``bad_words`` ``[B, W, L]``: token sequences, right-aligned, padded with -1.
    """

    temperature: Leaf
    top_p: Leaf
    top_k: Leaf
    min_p: Leaf
    repetition: Leaf
    presence: Leaf
    frequency: Leaf
    key: Leaf
    min_length: Leaf
    bad_words: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What penalties look at. ``seen`` ``[B, V]``: bit 0, the prompt has the token; above it,
    how often the answer does. ``recent`` ``[B, L - 1]``: the answer's last tokens, -1 before them.
    """

    seen: Leaf
    recent: Leaf


def plain_sampling(bad_words: tuple[int, int] = MAX_BAD_WORDS) -> Sampling:
    """One row's settings that change nothing, on the host: greedy, no penalty, no bad word."""
    return Sampling(
        temperature=np.float32(0),
        top_p=np.float32(1),
        top_k=np.int32(np.iinfo(np.int32).max),
        min_p=np.float32(0),
        repetition=np.float32(1),
        presence=np.float32(0),
        frequency=np.float32(0),
        key=np.zeros((2,), np.uint32),
        min_length=np.int32(0),
        bad_words=np.full(bad_words, -1, np.int32),
    )


def greedy_sampling(batch: int, bad_words: tuple[int, int] = MAX_BAD_WORDS) -> Sampling:
    """`plain_sampling` of every row."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, *leaf.shape)), plain_sampling(bad_words))


def empty_history(batch: int, vocab_size: int, recent: int = MAX_BAD_WORDS[1] - 1) -> History:
    """No token seen."""
    return History(jnp.zeros((batch, vocab_size), jnp.int32), jnp.full((batch, recent), -1, jnp.int32))


def remember(history: History, tokens: Int[Array, " B"], live: Bool[Array, " B"]) -> History:
    """Add one token of the answer to each ``live`` row."""
    V = history.seen.shape[1]
    at = jnp.where(live, tokens, V)
    seen = history.seen.at[jnp.arange(tokens.shape[0]), at].add(OUTPUT, mode="drop")
    shifted = jnp.concatenate([history.recent[:, 1:], tokens[:, None]], axis=1)
    return History(seen, jnp.where(live[:, None], shifted, history.recent))


@jax.named_scope("choose")
def choose(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    history: History,
    stop_ids: Int[Array, "B E"],
    positions: Int[Array, " B"],
) -> Int[Array, " B"]:
    """The token at ``positions`` of each row, drawn from the target's own distribution there."""
    logits = _banned(_penalised(logits, sampling, history), sampling, history, stop_ids, positions)
    greedy = likeliest(logits)
    return jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: jnp.where(sampling.temperature > 0, _sampled(logits, sampling, positions), greedy),
        lambda: greedy,
    )


def likeliest(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """The index of the largest logit, the first of equal ones (`jnp.argmax`).

    In two steps, the block and the place in it: XLA's CPU backend finds a maximum ten times as fast as its
    index.
    """
    V = logits.shape[-1]
    block = math.gcd(V, 512)
    if block < 32:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    blocks = logits.reshape(*logits.shape[:-1], V // block, block)
    best = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    own = jnp.take_along_axis(blocks, best[..., None, None], axis=-2)[..., 0, :]
    return (best * block + jnp.argmax(own, axis=-1)).astype(jnp.int32)


def _penalised(logits: Float[Array, "B V"], sampling: Sampling, history: History) -> Float[Array, "B V"]:
    """Repetition (arXiv 1909.05858, section 4.1), frequency and presence penalties."""
    times = (history.seen // OUTPUT).astype(jnp.float32)
    factor = jnp.where(history.seen > 0, sampling.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    return (
        logits - sampling.frequency[:, None] * times - jnp.where(times > 0, sampling.presence[:, None], 0.0)
    )


def _banned(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    history: History,
    stop_ids: Int[Array, "B E"],
    positions: Int[Array, " B"],
) -> Float[Array, "B V"]:
    """Stop ids before ``min_length``, and the last token of a bad word whose others stand already."""
    V = logits.shape[1]
    too_early = (positions < sampling.min_length)[:, None] & (stop_ids >= 0)
    before, last = sampling.bad_words[..., :-1], sampling.bad_words[..., -1]
    matches = jnp.all((before == history.recent[:, None, :]) | (before < 0), axis=-1) & (last >= 0)
    ids = jnp.concatenate([jnp.where(too_early, stop_ids, V), jnp.where(matches, last, V)], axis=1)
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].set(BANNED, mode="drop")


def _sampled(
    logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Gumbel-max over the tokens that temperature, min_p, top_k and top_p leave.

    The filters keep a token only if they keep all that are likelier. So the largest of all
    perturbed logits is drawn first; where top_p refuses it, it and everything less likely is
    out, and the next largest is drawn. That takes a round or two and no sort, and gives
    exactly the largest among the kept.
    """
    logits = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    top = jnp.max(logits, axis=1, keepdims=True)
    least = jnp.where(sampling.min_p > 0, top[:, 0] + jnp.log(sampling.min_p), BANNED)[:, None]
    kept = (logits >= least) & (logits >= _top_k_threshold(logits, sampling.top_k)[:, None])
    mass = jnp.where(kept, jnp.exp(logits - top), 0.0)
    allowed = sampling.top_p * jnp.sum(mass, axis=1)
    perturbed = jnp.where(kept, logits + _noise(sampling.key, positions, logits.shape[1]), BANNED)

    def draw(above: Float[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, " B"], Bool[Array, " B"]]:
        left = jnp.where(logits > above[:, None], perturbed, BANNED)
        token = likeliest(left)
        logit = jnp.take_along_axis(logits, token[:, None], axis=1)
        likelier = jnp.sum(jnp.where(logits > logit, mass, 0.0), axis=1)
        # Neither the likeliest nor nothing is refused, so this ends, with logits that are no numbers, too.
        some = (logit[:, 0] < top[:, 0]) & (jnp.max(left, axis=1) > BANNED)
        refused = (sampling.top_p < 1) & (likelier >= allowed) & some
        return token, logit[:, 0], refused

    def again(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        token, above, refused = carry
        next_token, next_above, still = draw(above)
        return jnp.where(refused, next_token, token), next_above, refused & still

    first = draw(jnp.full((logits.shape[0],), BANNED))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), again, first)[0]


def _noise(keys: Array, positions: Int[Array, " B"], vocab_size: int) -> Float[Array, "B V"]:
    def row(data: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(keys, positions)


def _top_k_threshold(logits: Float[Array, "B V"], k: Int[Array, " B"]) -> Float[Array, " B"]:
    """A value that exactly the k largest logits (and ties of the last) reach; -inf where ``k`` is V or more.

    Bisection over the floats' bits, read as integers that sort as the floats do.
    """
    V = logits.shape[1]
    flip = jnp.int32(0x7FFFFFFF)
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ flip, bits)
    ends = jnp.where(k < V, jnp.min(order, axis=1), 0), jnp.where(k < V, jnp.max(order, axis=1), 0)

    def halve(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = carry  # at least k logits reach low, and fewer reach anything above high
        middle = (low | high) - ((low ^ high) >> 1)  # (low + high) / 2 rounded up, without overflow
        reached = jnp.sum(order >= middle[:, None], axis=1)
        low, high = jnp.where(reached >= k, middle, low), jnp.where(reached > k, high, middle - 1)
        return low, jnp.maximum(low, high)

    low, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[0] < carry[1]), halve, ends)
    value = jax.lax.bitcast_convert_type(jnp.where(low < 0, low ^ flip, low), jnp.float32)
    return jnp.where(k < V, value, -jnp.inf)
