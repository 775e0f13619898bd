"""Which request lies in which row: no device, no compiler."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmemo_jax.draft import NgramDrafter
from specmemo_jax.engine.placement import UNBOUNDED, Placement
from specmemo_jax.engine.request import Request
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.testing import TINY

GROUPS = ((2, 56), (1, 110), (1, 240))


def shapes_of(groups):
    batch, context = sum(rows for rows, _ in groups), groups[-1][1]
    return Shapes(TINY, "float32", "cpu", context, batch, NgramDrafter(4), groups=groups)


SHAPES = shapes_of(GROUPS)


def begun(tokens, max_tokens=10**6):
    return Request([1] * tokens, max_tokens, ids=[1] * (tokens + 1))


@given(st.integers(1, 240), st.sets(st.integers(0, 3)))
def test_row_for_free_rows_takes_the_narrowest_that_fits(tokens, taken):
    placement = Placement(SHAPES)
    for row in taken:
        placement.put(row, begun(1))
    slots = [64, 64, 128, 256]
    needed = min(tokens + 4, 240) + 4
    fitting = [row for row in range(4) if row not in taken and slots[row] >= needed]
    assert placement.row_for(tokens) == (fitting[0] if fitting else None)
    assert placement.free == [row for row in range(4) if row not in taken]


@given(st.lists(st.integers(1, 240), min_size=1, max_size=4), st.data())
def test_outgrown_rows_have_no_room_for_a_step(lengths, data):
    placement = Placement(SHAPES)
    for row, tokens in enumerate(lengths):
        placement.put(row, begun(tokens))
    outgrown = dict(placement.outgrown())
    for row, request in enumerate(placement.rows):
        if request is None:
            continue
        room = [64, 64, 128][row] - 4 - len(request.ids) if row < 3 else UNBOUNDED
        assert (row in outgrown) == (room < 4)
        assert (placement.steps_left(row) == 0) == (row in outgrown)
    for row, to in outgrown.items():
        assert to is None or (to > row and placement.rows[to] is None)


def test_move_of_a_paused_request_lets_it_go_on():
    placement, request = Placement(SHAPES), begun(60)
    placement.put(0, request)
    request.paused = True
    assert placement.live == {}
    placement.move(0, 3)
    assert placement.live == {3: request}
    assert placement.kept == [None] * 4  # what the old row holds is another's to write over
    assert placement.free == [0, 1, 2]


def test_take_keeps_the_row_s_text_until_another_is_put_there():
    placement, request = Placement(SHAPES), begun(5, max_tokens=1)
    placement.put(1, request)
    assert placement.live == {}  # its budget is spent
    assert placement.cached == {1: request}
    assert placement.take(1) is request
    assert placement.cached == {1: request}
    placement.put(1, other := begun(3))
    assert placement.cached == {1: other}
    assert placement.kept[1] is None


@pytest.mark.parametrize("tokens", [1, 48, 49, 112, 113, 240])
def test_row_for_a_plan_of_one_group_is_any_row(tokens):
    placement = Placement(dataclasses.replace(SHAPES, groups=()))
    assert placement.row_for(tokens) == 0
    assert {placement.group_of(row) for row in range(4)} == {0}
