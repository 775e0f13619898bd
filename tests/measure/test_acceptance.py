import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from specmemo_jax.draft import LADDERS, NgramDrafter, SelfDrafter, TreeShape, make_drafter
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.packing import pack
from specmemo_jax.measure.acceptance import (
    NODES,
    Answer,
    Proposal,
    measure_ngram,
    measured_shapes,
    profile_of_steps,
    recorded,
    replay,
)
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.planning.expected import expected_acceptance
from specmemo_jax.testing import TINY, tiny_llama

LABELS = {"drafter": "ngram", "model": "tiny", "dtype": "float32", "prompts": "x", "date": "2026-01-31"}
RNG = np.random.default_rng(0)
TOKENS = 120  # until the text repeats itself, so that matches of every length are met


@functools.cache
def target():
    return pack(TINY, iter(tiny_llama().items()), jnp.dtype("float32"))


@functools.cache
def run(drafter):
    """Answers of the engine with this drafter, the proposals at its steps, and each step's tokens."""
    plan = lay_out(Shapes(TINY, "float32", "cpu", TINY.max_context, drafter=drafter))
    engine = Engine(target(), plan)
    answers, steps, lengths = [], [], []
    for prompt in PROMPTS:
        new, proposals = recorded(engine, Request(prompt, TOKENS))
        answers.append(Answer(prompt, tuple(new)))
        steps.append(proposals)
        engine.admit(0, Request(prompt, TOKENS))
        while (log := engine.rows[0]) is not None and not log.finished:
            engine.burst()
        log = engine.release(0)
        assert log.new_ids == new
        lengths.append(log.accepted_lengths)
    return answers, steps, lengths


PROMPTS = [tuple(RNG.integers(1, TINY.vocab_size, size=n).tolist()) for n in (5, 30)]
LADDER = NgramDrafter(8, branches=1, ladder=((4, 1), (8, 2)), min_hit_rate=0.35)


def test_proposals_know_what_was_accepted():
    # root 5 -> 6 -> 7, and 5 -> 8; the last node is not filled
    tokens, parents, depths = np.array([[5, 6, 8, 7, -1], [0, 0, 0, 1, 3], [0, 1, 1, 2, 3]])
    proposal = Proposal(tokens, parents, depths, (6, 9, 4))
    assert proposal.filled == 4
    assert proposal.accepted() == [(1, 0, True), (1, 1, False), (2, 0, False)]
    assert proposal.accepted_length == 2
    assert proposal.first(1).accepted_length == 1
    assert dataclasses.replace(proposal, truth=(8, 1)).accepted() == [(1, 0, False), (1, 1, True)]
    assert dataclasses.replace(proposal, truth=(6,)).accepted() == [(1, 0, True), (1, 1, False)]
    assert dataclasses.replace(proposal, truth=(6,)).accepted_length == 1  # nothing is known beyond


@pytest.mark.parametrize("drafter", [LADDER, SelfDrafter(1, TreeShape(6, 2, 3))])
def test_recorded_steps_are_the_engines(drafter):
    _, steps, lengths = run(drafter)
    assert [[p.accepted_length for p in row] for row in steps] == lengths
    profile = profile_of_steps(drafter, [p for row in steps for p in row], LABELS)
    flat = [length for row in lengths for length in row]
    assert profile.steps == len(flat)
    assert expected_acceptance(profile, drafter).accepted_length == pytest.approx(np.mean(flat))
    assert expected_acceptance(profile, drafter).source.startswith("measured over")


def test_replay_tells_what_the_engine_would_do():
    drafter = make_drafter("ngram", 8)
    assert isinstance(drafter, NgramDrafter)
    assert drafter in measured_shapes(NgramDrafter(16))
    answers, proposals, lengths = run(drafter)
    profile = measure_ngram(NgramDrafter(16), answers, LABELS)
    flat = [length for row in lengths for length in row]
    told = expected_acceptance(profile, drafter)
    assert told.accepted_length == pytest.approx(np.mean(flat))
    verified = [next(w for w in drafter.verify_buckets if w >= p.filled) for row in proposals for p in row]
    assert set(verified) == {1, 4, 8}
    shape = profile.measured(8, 7, 1, drafter.ladder, drafter.min_hit_rate)
    assert shape is not None
    assert shape.outcomes == tuple(
        (w, verified.count(w), sum(n for at, n in zip(verified, flat, strict=True) if at == w))
        for w in sorted(set(verified))
    )
    assert dict(told.widths) == pytest.approx({w: verified.count(w) / len(flat) for w in set(verified)})


def test_small_trees_are_the_beginning_of_large_ones():
    answers, _, _ = run(LADDER)
    for branches in (1, 3):
        large = replay(NgramDrafter(NODES, branches), answers[:1])[0]
        small = replay(NgramDrafter(12, branches), answers[:1])[0]
        for whole, part in zip(large, small, strict=True):
            cut = whole.first(12)
            assert np.array_equal(cut.tokens, part.tokens)
            assert np.array_equal(cut.parents[: part.filled], part.parents[: part.filled])
            assert cut.accepted_length == part.accepted_length


def test_outlooks_of_shapes_not_measured():
    answers, steps, _ = run(LADDER)
    profile = measure_ngram(NgramDrafter(16), answers, LABELS)
    sizes = [expected_acceptance(profile, NgramDrafter(nodes)) for nodes in (16, 18, 20)]
    assert "between measured trees" in sizes[1].source
    low, middle, high = (found.accepted_length for found in sizes)
    assert middle == pytest.approx((low + high) / 2)
    other = expected_acceptance(profile, NgramDrafter(18, branches=1, ladder=((6, 2), (18, 4))))
    assert "estimated" in other.source
    assert {width for width, _ in other.widths} <= {1, 6, 18}
    assert 1 <= other.accepted_length <= 18
    for dtype in LADDERS:  # the defaults are among what is measured, and so are their smaller trees
        for nodes in (None, 8, 4):
            drafter = make_drafter("ngram", nodes, dtype=dtype)
            assert drafter is not None
            assert expected_acceptance(profile, drafter).source.startswith("measured")
    chain = SelfDrafter(1, TreeShape(3, 2))
    running = profile_of_steps(chain, [p.first(3) for row in steps for p in row], LABELS)
    longer = expected_acceptance(running, SelfDrafter(1, TreeShape(6, 5)))
    assert "estimated" in longer.source
    assert longer.widths == ((6, pytest.approx(1)),)


def test_nothing_to_measure():
    with pytest.raises(ConfigError, match="answers of at least 2 tokens"):
        measure_ngram(NgramDrafter(16), [Answer((1, 2), (3,))], LABELS)
    with pytest.raises(ConfigError, match="no step was run"):
        profile_of_steps(LADDER, [], LABELS)
