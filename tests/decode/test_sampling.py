"""Every token is what plain NumPy says it must be: sorted filters, penalties one by one, the same noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmemo_jax.decode.sampling import (
    History,
    Sampling,
    choose,
    empty_history,
    greedy_sampling,
    likeliest,
    remember,
)

V, E, W, L = 24, 2, 2, 3
chosen = jax.jit(choose)


def noise(seed, position):
    bits = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    key = jax.random.wrap_key_data(bits, impl="threefry2x32")
    return np.asarray(jax.random.gumbel(jax.random.fold_in(key, position), (V,), jnp.float32))


def expected(logits, s, seen, recent, stop_ids, position):
    """The rule by sorting, in the order of the docs; ``s`` is a dict of plain values."""
    z = logits.astype(np.float32).copy()
    for token in range(V):
        if seen[token]:
            z[token] = z[token] / np.float32(s["rep"]) if z[token] > 0 else z[token] * np.float32(s["rep"])
        times = seen[token] // 2
        z[token] -= np.float32(s["freq"]) * times + np.float32(s["pres"]) * (times > 0)
    if position < s["min_length"]:
        z[stop_ids] = -np.inf
    for word in s["bad"]:
        if word and list(recent[len(recent) - len(word) + 1 :]) == word[:-1]:
            z[word[-1]] = -np.inf
    if s["t"] == 0:
        return int(np.argmax(z))
    z = z / np.float32(s["t"])
    order = np.argsort(-z, kind="stable")
    kept = [i for i in order if z[i] >= z[order[0]] + np.log(np.float32(max(s["min_p"], 1e-30)))]
    kept = [i for i in kept if z[i] >= z[order[min(s["k"], V) - 1]]]
    p = np.exp(z[kept] - z[order[0]])
    before = np.concatenate([[0], np.cumsum(p)[:-1]])
    kept = [i for i, b in zip(kept, before, strict=True) if b < s["p"] * p.sum()]
    return int(max(kept, key=lambda i: z[i] + noise(s["seed"], position)[i]))


words = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=L), max_size=W)
settings_of_a_row = st.fixed_dictionaries(
    {
        "t": st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.9]),
        "p": st.sampled_from([1.0, 0.95, 0.7, 0.2, 0.01]),
        "k": st.sampled_from([V + 1, 23, 7, 2, 1]),
        "min_p": st.sampled_from([0.0, 0.05, 0.4, 1.0]),
        "rep": st.sampled_from([1.0, 1.3, 0.8]),
        "pres": st.sampled_from([0.0, 0.7, -0.5]),
        "freq": st.sampled_from([0.0, 0.4]),
        "seed": st.integers(0, 2**64 - 1),
        "min_length": st.sampled_from([0, 50]),
        "bad": words,
    }
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(settings_of_a_row, min_size=2, max_size=2),
    data=st.integers(0, 10**6),
    position=st.integers(1, 99),
)
def test_choice_is_the_sorted_rule_s(rows, data, position):
    rng = np.random.default_rng(data)
    logits = (3 * rng.standard_normal((2, V))).astype(np.float32)
    seen = rng.choice([0, 0, 1, 2, 3, 4], (2, V)).astype(np.int32)
    recent = rng.integers(-1, 4, (2, L - 1)).astype(np.int32)
    stop_ids = rng.integers(0, V, (2, E)).astype(np.int32)
    bad = np.full((2, W, L), -1, np.int32)
    for b, row in enumerate(rows):
        for w, word in enumerate(row["bad"]):
            bad[b, w, L - len(word) :] = word

    def stack(name, dtype):
        return np.array([row[name] for row in rows], dtype)

    sampling = Sampling(
        temperature=stack("t", np.float32),
        top_p=stack("p", np.float32),
        top_k=stack("k", np.int32),
        min_p=stack("min_p", np.float32),
        repetition=stack("rep", np.float32),
        presence=stack("pres", np.float32),
        frequency=stack("freq", np.float32),
        key=np.array([[row["seed"] >> 32, row["seed"] & 0xFFFFFFFF] for row in rows], np.uint32),
        min_length=stack("min_length", np.int32),
        bad_words=bad,
    )
    got = chosen(logits, sampling, History(seen, recent), stop_ids, np.full((2,), position, np.int32))
    want = [expected(logits[b], rows[b], seen[b], recent[b], stop_ids[b], position) for b in range(2)]
    assert got.tolist() == want


def test_ties_of_the_kth_are_kept_and_the_likeliest_always_is():
    logits = np.zeros((1, V), np.float32)
    logits[0, 3:6] = 2.0
    base = greedy_sampling(1, (W, L))
    tied = dataclasses.replace(base, temperature=jnp.ones((1,)), top_k=jnp.array([2]))
    args = (empty_history(1, V, L - 1), np.full((1, E), -1, np.int32))
    drawn = {int(chosen(logits, tied, *args, np.array([i], np.int32))[0]) for i in range(60)}
    assert drawn == {3, 4, 5}
    narrow = dataclasses.replace(base, temperature=jnp.ones((1,)), top_p=jnp.array([1e-6]))
    logits[0, 9] = 5.0
    assert {int(chosen(logits, narrow, *args, np.array([i], np.int32))[0]) for i in range(40)} == {9}


def test_logits_that_are_not_numbers_end_too():
    base = greedy_sampling(1, (W, L))
    args = (empty_history(1, V, L - 1), np.full((1, E), -1, np.int32), np.array([5], np.int32))
    for top_p, bad in ((0.9, np.nan), (0.9, np.inf), (1e-46, 0.0)):
        logits = np.zeros((1, V), np.float32)
        logits[0, 2] = bad
        ones = jnp.ones((1,))
        sampling = dataclasses.replace(base, temperature=ones, top_p=jnp.array([top_p], jnp.float32))
        assert 0 <= int(chosen(logits, sampling, *args)[0]) < V


def test_history_counts_what_live_rows_emit():
    history = empty_history(2, V, L - 1)
    live = jnp.array([True, False])
    for token in (4, 4, 7):
        history = remember(history, jnp.array([token, token]), live)
    assert history.seen[0, 4] == 4
    assert history.seen[0, 7] == 2
    assert history.recent[0].tolist() == [4, 7]
    assert int(history.seen[1].sum()) == 0
    assert history.recent[1].tolist() == [-1, -1]


@pytest.mark.parametrize("vocab_size", [97, 256, 1000, 1536])
@pytest.mark.parametrize("rows", [(), (3,), (2, 4)])
def test_likeliest_is_the_first_of_the_largest(vocab_size, rows):
    rng = np.random.default_rng(vocab_size)
    equal = rng.integers(-3, 4, (*rows, vocab_size)).astype(np.float32)  # many share the largest
    banned = np.where(rng.random(equal.shape) < 0.99, -np.inf, equal).astype(np.float32)
    for logits in (equal, banned, np.full_like(equal, -np.inf), -equal * 1e30):
        np.testing.assert_array_equal(likeliest(jnp.asarray(logits)), logits.argmax(-1))
    equal[..., vocab_size // 2] = np.nan  # which one is not promised, but that it is one
    assert (np.asarray(likeliest(jnp.asarray(equal))) < vocab_size).all()
