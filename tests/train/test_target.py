import jax.numpy as jnp
import numpy as np

from specmemo_jax.checkpoints.open import open_model
from specmemo_jax.llama.packing import pack
from specmemo_jax.testing import TINY, tiny_llama, whole_logits
from specmemo_jax.train.loss import positions_of, sight
from specmemo_jax.train.target import likeliest, load_target, read

F32 = jnp.dtype("float32")
PARAMS = tiny_llama()
WEIGHTS = load_target(open_model(TINY, PARAMS), F32)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 12)).astype(np.int32)


def run(segments, taps=(0, 1, 2)):
    segments = jnp.asarray(segments, jnp.int32)
    return read(TINY, WEIGHTS, jnp.asarray(TOKENS), positions_of(segments), sight(segments, 0), taps)


def test_read_gives_the_targets_hidden_states():
    features, final = run(np.ones((2, 12)))
    target = pack(TINY, PARAMS.items(), F32)
    logits = np.asarray(whole_logits(target, target.leaves, jnp.asarray(TOKENS)))
    np.testing.assert_allclose(np.asarray(final) @ PARAMS["lm_head.weight"].T, logits, atol=1e-4)
    first, second, last = np.split(np.asarray(features), 3, axis=-1)
    np.testing.assert_array_equal(first, PARAMS["embed_tokens.weight"][TOKENS])
    np.testing.assert_array_equal(last, final)
    exit_ = np.asarray(whole_logits(target, target.leaves, jnp.asarray(TOKENS), num_layers=1))
    normed = second / np.sqrt(np.mean(second**2, -1, keepdims=True) + TINY.rms_norm_eps)
    normed = normed * PARAMS["norm.weight"]
    np.testing.assert_allclose(normed @ PARAMS["lm_head.weight"].T, exit_, atol=1e-4)
    np.testing.assert_array_equal(likeliest(WEIGHTS, final), logits.argmax(-1))


def test_read_of_packed_conversations_keeps_them_apart():
    _, alone = run(np.ones((2, 12)))
    segments = np.repeat([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]], 2, axis=0)
    _, packed = run(segments)
    np.testing.assert_allclose(packed[:, :5], alone[:, :5], atol=1e-5)
    moved = jnp.asarray(np.roll(TOKENS, -5, axis=1))
    ones = jnp.ones((2, 12), jnp.int32)
    _, second = read(TINY, WEIGHTS, moved, positions_of(ones), sight(ones, 0), (2,))
    np.testing.assert_allclose(packed[:, 5:10], second[:, :5], atol=1e-4)


def test_positions_begin_anew_in_each_conversation():
    assert positions_of(jnp.asarray([[1, 1, 2, 2, 2, 0]], jnp.int32)).tolist() == [[0, 1, 0, 1, 2, 0]]
