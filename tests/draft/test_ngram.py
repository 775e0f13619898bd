import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmemo_jax.draft import NgramDrafter, View, make_drafter
from specmemo_jax.draft.ngram import chain
from specmemo_jax.draft.tree import NO_TOKEN
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.kv import Groups
from specmemo_jax.llama.model import Llama
from specmemo_jax.testing import TINY

S = 24
VIEW = View((), Llama(TINY, jnp.dtype("float32")), ())


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


def filled(drafter, texts, pause=()):
    """Nodes that each row's proposals fill, told a token a step from its second on; at a step in ``pause``
    nobody asks.
    """
    most = max(map(len, texts))
    state = drafter.init(Groups.of(len(texts), S))
    rows, found = jnp.arange(len(texts)), []
    observe, propose = (jax.jit(call, static_argnums=0) for call in (drafter.observe, drafter.propose))
    for at in range(most):
        going = jnp.array([at < len(text) for text in texts])
        token = jnp.array([text[min(at, len(text) - 1)] for text in texts])
        lengths = jnp.array([min(at, len(text)) for text in texts])
        if at not in pause:
            tree, state = propose(VIEW, state, token, lengths)
            found.append((np.asarray(tree.tokens) != NO_TOKEN).sum(1))
        state = observe(VIEW, state, rows, token[:, None], lengths, going.astype(jnp.int32))
    return [[int(step[b]) for step in found[: len(text)]] for b, text in enumerate(texts)]


# After "1" comes always 2, and after "1 2" something else each time.
MISLEADING = [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2, 6, 1, 2, 9, 1, 2, 10, 1, 2]
PERIODIC = [5, 6, 7, 8] * 4
CAREFUL = NgramDrafter(4, branches=1, max_ngram=2, ladder=((4, 2),), min_hit_rate=0.35)


def test_matches_that_mislead_are_followed_no_longer_and_short_ones_that_tell_the_truth_are():
    bold = dataclasses.replace(CAREFUL, min_hit_rate=0.0)
    assert filled(bold, [MISLEADING]) == [[4 if at >= 4 and at % 3 == 1 else 1 for at in range(20)]]
    # Two tokens misled for the fifth time at position 16, one told the truth for the second time at 6.
    after_1, after_2 = range(9, 20, 3), range(4, 17, 3)
    assert filled(CAREFUL, [MISLEADING]) == [[4 if at in (*after_1, *after_2) else 1 for at in range(20)]]
    assert filled(CAREFUL, [PERIODIC]) == [[4 if at >= 5 else 1 for at in range(16)]]


def test_what_is_learned_is_the_rows_own_and_outlives_a_pause():
    alone = [filled(CAREFUL, [text])[0] for text in (MISLEADING, PERIODIC)]
    assert filled(CAREFUL, [MISLEADING, PERIODIC]) == alone
    late = filled(CAREFUL, [MISLEADING], pause={17, 18})  # the guess of position 16 is checked at 19
    assert late[0][-1] == alone[0][-1] == 1


def told(text, capacity=S):
    """The state after a text that was told and asked about a token a step, in row 1 of 2."""
    state: Any = CAREFUL.init(Groups.of(2, capacity))
    observe, propose = (jax.jit(call, static_argnums=0) for call in (CAREFUL.observe, CAREFUL.propose))
    for at, token in enumerate(text):
        lengths, pending = jnp.array([0, at]), jnp.array([0, token])
        _, state = propose(VIEW, state, pending, lengths)
        state = observe(VIEW, state, jnp.array([1]), pending[1:, None], lengths[1:], jnp.array([1]))
    return state


def rates(state, row=1):
    return state.hit_rates.rates[row].tolist()


FIRST = pytest.approx(CAREFUL.initial_hit_rates)


def test_what_is_learned_moves_and_grows_with_the_row():
    state = told(MISLEADING)
    found = rates(state)
    assert found[0] > CAREFUL.initial_hit_rates[0]
    assert found[1] < CAREFUL.initial_hit_rates[1]
    grown = CAREFUL.grow(state, Groups.of(2, 2 * S))
    assert grown.history.shape == (2, 2 * S)
    moved: Any = CAREFUL.move(grown, (0, jnp.int32(1)), (0, jnp.int32(0)), "cpu")
    assert rates(moved, 0) == rates(moved, 1) == found
    guesses = moved.hit_rates.last_guesses
    assert guesses[0].tolist() == guesses[1].tolist() == [10, len(MISLEADING), 2]
    assert moved.history[0].tolist() == moved.history[1].tolist()


@pytest.mark.parametrize(("start", "forgets"), [(0, True), (8, True), (len(MISLEADING), False)])
def test_a_row_that_starts_anew_or_goes_back_forgets_what_was_learned(start, forgets):
    state = told(MISLEADING)
    one = jnp.array([1])
    after: Any = CAREFUL.observe(VIEW, state, one, jnp.array([[5, 6, 0]]), jnp.array([start]), jnp.array([2]))
    assert rates(after) == (FIRST if forgets else rates(state))
    assert rates(after, 0) == FIRST
    assert bool(after.hit_rates.last_guesses[1].any()) is not forgets


@pytest.mark.parametrize("start", [1, 10, len(MISLEADING) - 1])
@pytest.mark.parametrize("more", [0, 1, 3])
def test_hit_rates_told_the_same_text_again_stay(start, more):
    """As in a chunk that is moved back from the end of a row's slots."""
    state = told(MISLEADING)
    chunk = [*MISLEADING[start:], *[90] * more]
    after: Any = CAREFUL.observe(
        VIEW, state, jnp.array([1]), jnp.array([chunk]), jnp.array([start]), jnp.array([len(chunk)])
    )
    assert rates(after) == rates(state)
    assert after.hit_rates.last_guesses.tolist() == state.hit_rates.last_guesses.tolist()


@pytest.mark.parametrize("start", [0, 1, 10])
@pytest.mark.parametrize("how", ["another token", "a shorter text"])
def test_hit_rates_told_another_text_begin_anew(start, how):
    state = told(MISLEADING)
    chunk = MISLEADING[start:-2] if how == "a shorter text" else [*MISLEADING[start:-4], 77, *MISLEADING[-3:]]
    after: Any = CAREFUL.observe(
        VIEW, state, jnp.array([1]), jnp.array([chunk]), jnp.array([start]), jnp.array([len(chunk)])
    )
    assert rates(after) == FIRST
    assert not after.hit_rates.last_guesses[1].any()


@pytest.mark.parametrize("bad", [{"min_hit_rate": 0.3}, {"ladder": ((8, 2),), "min_hit_rate": 1.0}])
def test_a_chance_that_cannot_be_asked_for(bad):
    with pytest.raises(ConfigError, match="min_hit_rate"):
        NgramDrafter(8, **bad)


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
