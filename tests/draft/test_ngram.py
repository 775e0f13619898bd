import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmemo_jax.draft import NgramDrafter, View, make_drafter
from specmemo_jax.draft.ngram import chain
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.kv import Groups
from specmemo_jax.llama.model import Llama
from specmemo_jax.speculate.tree import NO_TOKEN
from specmemo_jax.testing import TINY

S = 24
VIEW = View((), Llama(TINY, jnp.dtype("float32")), (), "cpu")


@functools.cache
def program(drafter):
    """Read and propose, in one compiled program as in the engine."""

    @jax.jit
    def run(tokens, counts, pending):
        state = drafter.init(Groups.of(len(tokens), S))
        rows = jnp.arange(len(tokens))
        state = drafter.observe(VIEW, state, rows, tokens, jnp.zeros_like(counts), counts)
        return drafter.propose(VIEW, state, pending, counts)[0]

    return run


def propose(drafter, rows):
    """Trees for token lists, the last token of each pending."""
    tokens = np.zeros((len(rows), S), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    counts = jnp.array([len(row) - 1 for row in rows])
    return program(drafter)(jnp.asarray(tokens), counts, jnp.array([row[-1] for row in rows]))


def continuations(row, drafter):
    """The same search in plain Python: branches of tokens, best first."""
    end = len(row) - 1
    scored = []
    for j in range(end):
        n = 0
        while n < drafter.max_ngram and j - n >= 0 and row[j - n] == row[end - n]:
            n += 1
        if n:
            scored.append((n, j))
    branches = []
    for _, j in sorted(scored, reverse=True):
        tokens = [row[j + 1 + i % (end - j)] for i in range(drafter.max_depth)]
        if all(tokens[0] != other[0] for other in branches):
            branches.append(tokens)
    return branches[: drafter.branches]


def paths(tree, b):
    """Root-to-node token paths of row ``b``'s filled nodes."""
    tokens, parents, depths = (np.asarray(x)[b] for x in (tree.tokens, tree.parents, tree.depths))
    found = []
    for node in range(1, len(tokens)):
        if tokens[node] == NO_TOKEN:
            continue
        path, at = [], node
        while at:
            assert parents[at] < at
            assert depths[at] == depths[parents[at]] + 1
            path.append(int(tokens[at]))
            at = int(parents[at])
        found.append(tuple(reversed(path)))
    return found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=S - 1), min_size=2, max_size=2),
    drafter=st.sampled_from([NgramDrafter(6), NgramDrafter(5, branches=2, max_ngram=2), chain(4)]),
)
def test_tree_holds_the_best_continuations(rows, drafter):
    tree = propose(drafter, rows)
    for b, row in enumerate(rows):
        branches = continuations(row, drafter)
        found = paths(tree, b)
        assert int(tree.tokens[b, 0]) == row[-1]
        assert len(found) == len(set(found)) == (drafter.num_nodes - 1 if branches else 0)
        prefixes = {tuple(branch[:d]) for branch in branches for d in range(1, len(branch) + 1)}
        assert set(found) <= prefixes
        if branches:
            assert tuple(branches[0][:1]) in found


def test_a_repetition_is_followed_beyond_the_end():
    tree = propose(chain(7), [[5, 1, 2, 3, 1, 2, 3, 1]])
    assert tree.tokens[0].tolist() == [1, 2, 3, 1, 2, 3, 1]


def test_the_longest_match_wins_over_the_latest():
    tree = propose(chain(3), [[7, 8, 1, 2, 9, 8, 3, 4, 7, 8]])
    assert tree.tokens[0].tolist() == [8, 1, 2]


def test_nothing_to_say_about_a_new_token():
    tree = propose(NgramDrafter(4), [[1, 2, 3]])
    assert tree.tokens[0].tolist() == [3, NO_TOKEN, NO_TOKEN, NO_TOKEN]


def test_names():
    assert make_drafter(None) is None
    assert make_drafter("none") is None
    drafter = make_drafter("ngram", 5)
    assert drafter is not None
    assert drafter.num_nodes == 5
    with pytest.raises(ConfigError, match="'nope'"):
        make_drafter("nope")
    with pytest.raises(ConfigError, match="at least 2"):
        make_drafter("ngram", 1)
    with pytest.raises(ConfigError, match="tree_nodes=9"):
        make_drafter(NgramDrafter(8), 9)
