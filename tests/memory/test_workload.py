"""Rows laid out in groups for the lengths of requests, and a batch that is chosen."""

import dataclasses
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from specmemo_jax.devices.table import find_device
from specmemo_jax.draft import NgramDrafter
from specmemo_jax.errors import BudgetError
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.memory.workload import MOST_GROUPS, NARROWEST, STEP_ROOM, WORTH, Workload, groups_for
from specmemo_jax.planning.profile import ExpectedAcceptance
from specmemo_jax.planning.search import BATCH_CHOICES, Candidate, PlanRequest, search
from specmemo_jax.planning.speed import roofline
from specmemo_jax.testing import TINY

LONG = dataclasses.replace(TINY, max_context=2048)
DRAFTER = NgramDrafter(4)
OPTIONS = (Candidate(), Candidate(DRAFTER, ExpectedAcceptance(1.5, ((4, 1.0),), "assumed")))


@example([1, 241, 241, 241], 12, 300)  # saves 5% to the slot
@given(st.lists(st.integers(1, 3000), max_size=40), st.integers(1, 20), st.integers(300, 2048))
def test_groups_serve_the_lengths(lengths, batch, context):
    lengths = [min(length, context) for length in lengths]
    groups = groups_for(lengths, batch, context)
    if not groups:
        return
    assert sum(rows for rows, _ in groups) == batch
    assert groups[-1][1] == context
    assert 2 <= len(groups) <= MOST_GROUPS
    contexts = [own for _, own in groups]
    assert contexts == sorted(set(contexts))
    assert sum(rows * own for rows, own in groups) <= batch * context - WORTH * batch * context
    for narrow, wide in itertools.pairwise(groups):  # as many wider rows as the share of requests needs
        needing = sum(length > narrow[1] for length in lengths)
        wider = sum(rows for rows, own in groups if own >= wide[1])
        assert wider >= int(batch * needing / len(lengths))
    lay_out(Shapes(LONG, dtype="float32", platform="cpu", batch=batch, context=context, groups=groups))


def test_a_few_long_requests_need_few_wide_rows():
    groups = groups_for([200] * 90 + [1900] * 10, 10, 2000)
    assert groups == ((9, NARROWEST - STEP_ROOM), (1, 2000))
    assert groups_for([1900] * 100, 10, 2000) == ()
    assert groups_for([200] * 100, 1, 2000) == groups_for([], 8, 2000) == ()


def task(batch, lengths=(), context=2000):
    return PlanRequest(LONG, "float32", find_device("titan-rtx"), Workload(batch, 100, 50, context, lengths))


def test_groups_make_a_plan_smaller():
    speed = roofline(find_device("titan-rtx"))
    one = search(task(10), OPTIONS, speed)
    grouped = search(task(10, (150,) * 95 + (2000,) * 5), OPTIONS, speed)
    assert one.shapes.groups == ()
    assert len(grouped.shapes.groups) > 1
    assert grouped.bounds is not None
    assert one.bounds is not None
    assert grouped.bounds.least_budget < one.bounds.least_budget
    assert grouped.context == 2000


def test_the_batch_is_the_fastest_that_fits():
    speed = roofline(find_device("titan-rtx"))
    most = search(task(None), OPTIONS, speed)
    assert most.batch in BATCH_CHOICES
    assert most.batch > 8  # a step of a tiny model costs the same for many rows
    assert most.bounds is not None
    assert most.bounds.most_rows is not None
    three = search(task(3), OPTIONS, speed)
    assert three.bounds is not None
    tight = search(task(None), OPTIONS, speed, three.bounds.least_budget)
    assert tight.bounds is not None
    assert tight.bounds.most_rows is not None
    assert tight.batch <= 3 <= tight.bounds.most_rows
    assert tight.peak_bytes <= three.bounds.least_budget
    with pytest.raises(BudgetError, match="would work"):
        search(task(None), OPTIONS, speed, 10**6)
