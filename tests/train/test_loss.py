import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmemo_jax.train import judge
from specmemo_jax.train.loss import Rows, _valid, sight

F32 = jnp.dtype("float32")


def scene(rows=12, size=7, hidden=5):
    rng = np.random.default_rng(0)
    x, table = rng.standard_normal((rows, hidden)), rng.standard_normal((size, hidden))
    labels, weights = rng.standard_normal((rows, size)), rng.random(rows)
    arrays = (jnp.asarray(a, jnp.float32) for a in (x, table, labels, weights))
    x, table, labels, weights = arrays
    return x, table, labels, jnp.asarray(rng.integers(-1, size, rows), jnp.int32), weights


def test_judged_says_divergence_acceptance_and_who_is_right():
    x, table, labels, best, weights = scene()
    loss, right, accepted = judge.judged(x, table, labels, best, weights, "kl", F32)
    q, p = (np.asarray(jax.nn.softmax(s)) for s in (x @ table.T, labels))
    np.testing.assert_allclose(loss, np.sum(weights[:, None] * p * np.log(p / q)), rtol=1e-5)
    np.testing.assert_allclose(accepted, np.minimum(p, q).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(right, q.argmax(-1) == np.asarray(best))


@pytest.mark.parametrize("kind", ["kl", "lk"])
def test_judged_has_the_gradient_of_its_chunks_together(kind, monkeypatch):
    x, table, labels, best, weights = scene()

    def loss(x, table):
        return judge.judged(x, table, labels, best, weights, kind, F32)[0]

    def plain(x, table):
        return judge._chunk(x, table, labels, best, weights, kind=kind, dtype=F32)[0]

    monkeypatch.setattr(judge, "CHUNK", 4)
    found = jax.value_and_grad(loss, (0, 1))(x, table)
    wanted = jax.value_and_grad(plain, (0, 1))(x, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)


def test_sight_is_causal_within_a_conversation_and_keeps_behind():
    segments = jnp.asarray([[1, 1, 1, 2, 2]], jnp.int32)
    assert np.asarray(sight(segments, 0))[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert np.asarray(sight(segments, 1))[0].astype(int).tolist() == [
        [0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0],
    ]


def test_chains_are_of_answers_and_stay_in_their_conversation():
    answers = jnp.asarray([[0, 0, 1, 1, 1, 0, 0, 1, 0, 0]], bool)
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]], jnp.int32)
    rows = Rows(jnp.zeros((1, 10), jnp.int32), segments, answers)
    # By first slot: the drafted tokens are two slots on, then three.
    assert np.flatnonzero(np.asarray(_valid(rows, 0))).tolist() == [0, 1, 2, 5]
    assert np.flatnonzero(np.asarray(_valid(rows, 1))).tolist() == [0, 1]
