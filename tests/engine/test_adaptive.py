"""Which tree runs, from costs and gains that are made up here."""

import pytest

from specmemo_jax.engine.adaptive import PROBE, TreeChooser


def run(chooser, seconds, tokens, steps=4000, burst=8, reading=0.0, waiting=0):
    """Time and tokens of a run in which a step of each tree costs and gives what the mappings say, and
    reading what a burst said costs something, too.
    """
    time = got = done = 0
    used = dict.fromkeys(chooser.tree_sizes, 0)
    while done < steps:
        nodes, count = chooser.choose(burst, waiting)
        gain, cost = (of[nodes](done) if callable(of[nodes]) else of[nodes] for of in (tokens, seconds))
        took = count * cost + reading
        chooser.record(nodes, count, took, count * gain)
        time, got, done = time + took, got + count * gain, done + count
        used[nodes] += count
    return time, got, used


@pytest.mark.parametrize(
    ("seconds", "tokens"),
    [
        ({1: 1.0, 4: 1.5, 16: 3.0}, {1: 1.0, 4: 1.05, 16: 1.1}),  # it never pays
        ({1: 1.0, 4: 1.02, 16: 1.3}, {1: 1.0, 4: 1.0, 16: 1.0}),  # nothing is ever accepted
        ({1: 1.0, 4: 1.1, 16: 1.4}, {1: 1.0, 4: 1.8, 16: 3.5}),  # it pays
        ({1: 1.0, 4: 1.1, 16: 2.0}, {1: 1.0, 4: 1.9, 16: 2.1}),  # the middle is best
    ],
)
def test_as_fast_as_the_best_tree(seconds, tokens):
    time, got, used = run(TreeChooser((1, 4, 16)), seconds, tokens)
    best = max(tokens[n] / seconds[n] for n in (1, 4, 16))
    assert got / time >= 0.96 * best
    assert all(used.values())  # each was tried


def test_it_comes_back_when_the_text_changes():
    tokens = {1: 1.0, 8: lambda done: 1.0 if done < 2000 else 4.0}
    time, got, used = run(TreeChooser((1, 8)), {1: 1.0, 8: 1.5}, tokens, steps=6000)
    assert used[8] > 2000
    assert got / time > 1.0


def test_a_tree_that_pays_now_and_then_is_kept_meanwhile():
    # A drafter that guesses where the text repeats, and costs next to nothing where it does not.
    repeats = [done % 160 < 32 for done in range(6000)]
    seconds = {1: 1.0, 16: lambda done: 2.0 if repeats[done] else 1.02}
    tokens = {1: 1.0, 16: lambda done: 4.0 if repeats[done] else 1.0}
    time, got, _ = run(TreeChooser((1, 16)), seconds, tokens, steps=6000)
    always = sum(map(tokens[16], range(6000))) / sum(map(seconds[16], range(6000)))
    assert got / time > 0.97 * always


def test_a_tree_that_turns_bad_is_left_soon():
    # A drafter that costs a step and guesses no more: an answer of prose after many that repeat.
    tokens = {1: 1.0, 16: lambda done: 4.0 if done < 2000 else 1.0}
    _, _, used = run(TreeChooser((1, 16)), {1: 1.0, 16: 2.0}, tokens, steps=2300)
    assert 1900 < used[16] < 2060


def test_a_losing_tree_that_costs_little_stays_within_reach():
    tokens = {1: 1.0, 16: lambda done: 1.0 if done < 4000 else 2.0}
    _, _, used = run(TreeChooser((1, 16)), {1: 1.0, 16: 1.1}, tokens, steps=6000)
    assert used[16] > 1000


def test_a_losing_tree_is_tried_seldom():
    _, _, used = run(TreeChooser((1, 64)), {1: 1.0, 64: 10.0}, {1: 1.0, 64: 1.0}, steps=10_000)
    assert used[64] <= 16 + PROBE * 12


def test_one_tree_needs_no_choice_and_short_answers_no_second_program():
    chooser = TreeChooser((1, 8))
    assert chooser.ahead(8) == (8,)
    assert chooser.ahead(100) == (1, 8)
    assert chooser.choose(8) == (8, 8)


def test_where_rows_share_a_step_a_small_gain_over_plain_decoding_does_not_count():
    seconds = {1: 1.0, 4: 1.0, 8: 1.0}
    _, _, used = run(TreeChooser((1, 4, 8), rows=2), seconds, {1: 1.0, 4: 1.01, 8: 1.04})
    assert used[1] > 3800
    _, _, used = run(TreeChooser((1, 4, 8), rows=2), seconds, {1: 1.0, 4: 1.2, 8: 1.21})
    assert used[8] > 3000  # trees are held against each other as they are


def test_a_small_gain_counts_while_many_requests_wait():
    seconds, tokens = {1: 1.0, 4: 1.0}, {1: 1.0, 4: 1.1}
    used = [run(TreeChooser((1, 4), rows=4), seconds, tokens, waiting=w)[2] for w in (0, 4, 16, 1000)]
    assert [counts[4] > 3000 for counts in used] == [False, False, True, True]
    used = run(TreeChooser((1, 4), rows=4), seconds, {1: 1.0, 4: 1.03}, waiting=1000)[2]
    assert used[1] > 3000  # noise is as much


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_trying_is_cheaper_where_many_rows_tell(rows):
    chooser = TreeChooser((1, 4), rows)
    time, got, used = run(chooser, {1: 1.0, 4: 2.0}, {1: 1.0, 4: 1.4}, steps=400)
    assert used[4] <= (48 if rows == 1 else 12)
    assert got / time > (0.93 if rows == 1 else 0.985)


def test_trees_are_compared_by_whole_bursts_where_reading_takes_as_long_as_a_step():
    seconds, tokens = {1: 1.0, 8: 1.1}, {1: 1.0, 8: 1.05}
    _, _, used = run(TreeChooser((1, 8), rows=4, probe=8), seconds, tokens, reading=1.0)
    assert used[1] > 3500
    _, _, used = run(TreeChooser((1, 8), rows=4), seconds, tokens, reading=1.0)
    assert used[1] < 500  # a try of one step seems to cost two
