import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmemo_jax.draft.static_tree import best_tree
from specmemo_jax.errors import ConfigError
from specmemo_jax.planning.profile import (
    AcceptanceProfile,
    ExpectedAcceptance,
    MatchStrength,
    MeasuredShape,
    StrengthTree,
    find_profile,
    user_folder,
)

MANY = 10**9  # so many counts that smoothing is nothing beside them


def profile(*signals, shapes=()):
    return AcceptanceProfile("ngram", "tiny", "float32", "some.jsonl", "2026-01-31", signals, shapes)


def exactly(chances):
    """A profile whose chances are these, to some digits."""
    seen = tuple(tuple(MANY for _ in row) for row in chances)
    accepted = tuple(tuple(round(MANY * p) for p in row) for row in chances)
    return profile(MatchStrength(1, MANY, seen, accepted))


@functools.cache
def trees(nodes):
    """Every tree of so many nodes as parents, siblings in every order."""
    if nodes == 1:
        return ((0,),)
    return tuple((*tree, parent) for tree in trees(nodes - 1) for parent in range(nodes - 1))


def levels(parents):
    depths = [0]
    for node in range(1, len(parents)):
        depths.append(depths[parents[node]] + 1)
    return max(depths)


def widest(parents):
    return max((parents[1:].count(node) for node in range(len(parents))), default=0)


def test_expected_length_sums_the_paths():
    some = exactly([(0.5, 0.2), (0.6, 0.1)])
    assert some.expected_length((0,)) == 1
    assert some.expected_length((0, 0, 1)) == pytest.approx(1 + 0.5 + 0.5 * 0.6)
    # Two children of the root; each has children of its own, which rank among themselves.
    assert some.expected_length((0, 0, 0, 1, 2, 2)) == pytest.approx(
        1 + 0.5 + 0.2 + 0.5 * 0.6 + 0.2 * 0.6 + 0.2 * 0.1
    )
    # Nothing is promised beyond the depths and ranks that were seen.
    assert some.expected_length((0, 0, 1, 2, 3)) == pytest.approx(1.8)
    assert some.expected_length((0, 0, 0, 0)) == pytest.approx(1.7)
    with pytest.raises(ConfigError, match="node 1 has parent 2"):
        some.expected_length((0, 2, 0))


@settings(max_examples=60, deadline=None)
@given(
    chances=st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=3),
    nodes=st.integers(1, 6),
    limit=st.tuples(st.none() | st.integers(1, 4), st.none() | st.integers(1, 3)),
)
def test_best_tree_against_every_tree(chances, nodes, limit):
    depth, branches = limit
    some = exactly(chances)
    fitting = [
        tree
        for tree in trees(nodes)
        if (depth is None or levels(tree) <= depth) and (branches is None or widest(tree) <= branches)
    ]
    best = max(map(some.expected_length, fitting), default=None)
    found = best_tree(some.chances, nodes, depth, branches)
    assert len(found) <= nodes
    assert all(parent < node for node, parent in enumerate(found) if node)
    assert depth is None or levels(found) <= depth
    assert branches is None or widest(found) <= branches
    if best is not None:
        assert some.expected_length(found) == pytest.approx(best, abs=1e-7)


def test_best_tree_of_nothing():
    assert best_tree(profile(MatchStrength(1, 5, (), ())).chances, 8) == (0,)
    with pytest.raises(ConfigError, match="nodes must be at least 1, found 0"):
        best_tree(exactly([(0.5,)]).chances, 0)


def test_small_counts_lean_on_the_level_above():
    few = profile(MatchStrength(1, 100, ((100,), (2,)), ((50,), (2,))))
    assert few.chances[0] == (0.5,)
    assert few.chances[1] == (pytest.approx((2 + 4 * 0.5) / (2 + 4)),)
    many = profile(MatchStrength(1, 10_000, ((10_000,), (5_000,)), ((5_000,), (5_000,))))
    assert many.chances[1][0] > 0.999


def test_ladders_weigh_what_each_signal_brings():
    some = profile(
        MatchStrength(0, 50 * MANY, (), ()),
        MatchStrength(1, 30 * MANY, ((30 * MANY,),), ((15 * MANY,),)),
        MatchStrength(4, 20 * MANY, ((20 * MANY,), (20 * MANY,)), ((20 * MANY,), (20 * MANY,))),
    )
    assert some.filled == 0.5
    chain = (0, 0, 1)
    ladder = some.expected_acceptance([StrengthTree(1, 2, (0, 0)), StrengthTree(4, 3, chain)])
    assert ladder.widths == ((1, 0.5), (2, 0.3), (3, 0.2))
    assert ladder.accepted_length == pytest.approx(0.5 + 0.3 * 1.5 + 0.2 * 3)
    always = some.expected_acceptance([StrengthTree(0, 3, chain)])
    assert always.widths == ((3, pytest.approx(1.0)),)
    assert always.accepted_length >= ladder.accepted_length
    assert "some.jsonl" in ladder.source


def test_a_batch_takes_its_widest_row():
    assert ExpectedAcceptance(1.5, ((1, 0.5), (4, 0.5)), "").widths_of_batch(2) == ((1, 0.25), (4, 0.75))


SHAPE = MeasuredShape(4, 3, 1, ((4, 2),), 0.35, ((1, 6, 6), (4, 2, 5)))


def test_a_measured_shape():
    some = profile(MatchStrength(1, 3, ((3,),), ((1,),)), shapes=(SHAPE,))
    assert some.measured(4, 3, 1, [(4, 2)], 0.35) == SHAPE
    assert some.measured(4, 3, 1, [(4, 2)]) is None
    assert some.measured(4, 3, 1) is None
    assert SHAPE.expected_acceptance.accepted_length == 11 / 8
    assert SHAPE.expected_acceptance.widths == ((1, 0.75), (4, 0.25))


def test_files_round_trip_and_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path))
    some = profile(MatchStrength(1, 30, ((30, 9), (10,)), ((10, 2), (5,))), shapes=(SHAPE,))
    folder = user_folder("org/some model")
    assert find_profile("ngram", folder) is None
    some.save(folder / "ngram.json")
    assert find_profile("ngram", tmp_path / "none", folder) == some
    assert [file.name for file in folder.iterdir()] == ["ngram.json"]
    some.save(folder / "self-2.json")
    assert find_profile("self:2", folder) == some
    older = json.loads((folder / "ngram.json").read_text())
    del older["shapes"][0]["min_hit_rate"]
    (folder / "ngram.json").write_text(json.dumps(older))
    assert AcceptanceProfile.load(folder / "ngram.json").shapes[0].min_hit_rate == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 99}, "this version reads 1"),
        ({"drafter": 3}, "drafter must be a text"),
        ({"signals": []}, "holds no steps"),
        ({"signals": [{"strength": 1, "steps": 2, "seen": [[2]]}]}, "'accepted' is missing"),
        ({"signals": [{"strength": 1, "steps": 2, "seen": [[2]], "accepted": [[3]]}]}, "more was accepted"),
        (
            {"signals": [{"strength": 1, "steps": 1, "seen": [[2]], "accepted": [[1]]}]},
            "more seen than",
        ),
        ({"signals": [{"strength": 1, "steps": 1, "seen": [[1]], "accepted": []}]}, "differ in shape"),
        ({"signals": [{"strength": 1, "steps": 1, "seen": [[0.5]], "accepted": [[0]]}]}, "integers"),
        ({"signals": "many"}, "list of objects"),
        (
            {
                "shapes": [
                    {"nodes": 2, "depth": 1, "branches": 1, "ladder": [], "min_hit_rate": 0, "outcomes": []}
                ]
            },
            "no steps",
        ),
        (
            {
                "shapes": [
                    {
                        "nodes": 2,
                        "depth": 1,
                        "branches": 1,
                        "ladder": [],
                        "min_hit_rate": 0,
                        "outcomes": [[2, 1, 9]],
                    }
                ]
            },
            "1 to 2 tokens",
        ),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, change, problem):
    file = tmp_path / "ngram.json"
    profile(MatchStrength(1, 3, ((3,),), ((1,),))).save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=problem) as error:
        AcceptanceProfile.load(file)
    assert str(file) in str(error.value)


def test_files_that_are_no_profiles(tmp_path):
    for content in ("", "[]", "{"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ConfigError, match=r"specmemo calibrate --prompts FILE. writes one"):
            AcceptanceProfile.load(tmp_path / "x.json")
