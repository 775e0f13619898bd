import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import ancestors_of, trees, walk

from specmemo_jax.decode.accept import Accepted, accept_greedy
from specmemo_jax.decode.rows import Rows, Settings, truncate_at_stop
from specmemo_jax.decode.sampling import empty_history, greedy_sampling
from specmemo_jax.draft.tree import Tree, ancestor_mask

T = 9
cut_jitted = jax.jit(truncate_at_stop)


@jax.jit
def verify(tree, choices):
    mask = ancestor_mask(tree.parents, T - 1)
    return mask, accept_greedy(tree, mask, choices, T - 1)


def padded(rows, T):
    """Trees of different sizes as one batch of T nodes; the filling hangs unfilled from the root."""
    tokens, parents, depths = (np.zeros((len(rows), T), np.int32) for _ in range(3))
    tokens -= 1
    depths[:, 1:] = 1
    for b, row in enumerate(rows):
        for out, values in zip((tokens, parents, depths), row, strict=True):
            out[b, : len(values)] = values
    return tokens, parents, depths


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(trees(), min_size=2, max_size=2), seed=st.integers(0, 10**6))
def test_mask_and_acceptance_equal_the_plain_walk(rows, seed):
    tokens, parents, depths = padded(rows, T)
    choices = np.random.default_rng(seed).integers(0, 5, (2, T)).astype(np.int32)
    mask, got = verify(Tree(*(jnp.asarray(x) for x in (tokens, parents, depths))), jnp.asarray(choices))
    np.testing.assert_array_equal(mask, np.stack([ancestors_of(p) for p in parents]))
    for b in range(2):
        path, emitted = walk(tokens[b], parents[b], choices[b])
        n = len(path)
        assert int(got.counts[b]) == n
        assert got.path[b, :n].tolist() == path
        assert got.emitted[b, :n].tolist() == emitted


@settings(max_examples=60, deadline=None)
@given(
    emitted=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    count=st.integers(1, 6),
    left=st.integers(1, 8),
    stop_ids=st.lists(st.integers(0, 4), max_size=3),
    done=st.booleans(),
)
def test_a_row_emits_nothing_past_its_stop_or_budget(emitted, count, left, stop_ids, done):
    ends = jnp.array([stop_ids + [-1] * (3 - len(stop_ids))])
    rows = Rows(
        lengths=jnp.array([7]),
        pending=jnp.array([0]),
        done=jnp.array([done]),
        settings=Settings(left=jnp.array([left]), stop_ids=ends, sampling=greedy_sampling(1, (1, 2))),
        history=empty_history(1, 5, 1),
    )
    accepted = Accepted(
        path=jnp.zeros((1, 6), jnp.int32), emitted=jnp.array([emitted]), counts=jnp.array([count])
    )
    counts, stopped = cut_jitted(accepted, rows)
    said = emitted[: min(count, left)]
    ends = [i for i, token in enumerate(said) if token in stop_ids]
    want = 0 if done else ends[0] + 1 if ends else len(said)
    assert int(counts[0]) == want
    assert bool(stopped[0]) == (bool(ends) and not done)
