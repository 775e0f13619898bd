"""Rows in groups of their own width: the same tokens, wherever a row lies and however often it moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.draft import Drafter, DraftModel, NgramDrafter, SelfDrafter, TreeShape
from specmemo_jax.draft.tree import NO_TOKEN, Tree
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.programs import Programs
from specmemo_jax.engine.request import Request
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama import kv
from specmemo_jax.llama.kv import Groups
from specmemo_jax.llama.packing import pack
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.planning.prove import lowerings
from specmemo_jax.serve.params import SamplingParams
from specmemo_jax.serve.requests import device_sampling, pad_bad_words
from specmemo_jax.serve.serve import Job, serve
from specmemo_jax.testing import TINY, tiny_llama

TARGET = pack(TINY, iter(tiny_llama().items()), jnp.dtype("float32"))
SMALL = dataclasses.replace(TINY, num_layers=1, hidden_size=16, ffn_size=24, num_heads=2, num_kv_heads=1)
STRANGER = pack(SMALL, iter(tiny_llama(SMALL, seed=5).items()), jnp.dtype("bfloat16"))
DRAFTERS = {
    "vanilla": None,
    "ngram": NgramDrafter(8),
    "model": DraftModel.of(STRANGER, TreeShape(9, depth=3, branches=3)),
    "itself": DraftModel.of(TARGET, TreeShape.of(5)),
    "self": SelfDrafter(1, TreeShape.of(4)),
}
LENGTHS = (3, 17, 33, 40, 150, 5, 60, 21, 8, 90)
PROMPTS = [np.random.default_rng(i).integers(0, 97, n).tolist() for i, n in enumerate(LENGTHS)]
TOKENS = (90, 40, 12, 60, 40, 100, 70, 1, 30, 55)
GROUPS = ((2, 56), (1, 110), (1, 240))  # most prompts begin in the first and outgrow it
PLAIN = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=7)


@functools.cache
def engine_for(name, groups, kv_dtype=None):
    batch, context = sum(rows for rows, _ in groups), groups[-1][1]
    plan = lay_out(
        Shapes(TINY, "float32", "cpu", context, batch, DRAFTERS[name], groups=groups, kv_dtype=kv_dtype)
    )
    return Engine(TARGET, plan)


def answers(engine, params, look=lambda engine: None):
    """Every prompt's new ids, and the moves."""
    moved, jobs = [], []
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, TOKENS, strict=True)):
        sampling = None
        if not params.is_plain:
            sampling = device_sampling(params, prompt, i, pad_bad_words(()))
        jobs.append(Job(str(i), None, Request(prompt, tokens, sampling=sampling), params))
    migrate = engine.migrate_rows

    def seen():
        look(engine)
        for move in migrate():
            moved.append(move)
            yield move

    engine.migrate_rows = seen
    try:
        for _ in serve(engine, jobs, burst=4, ahead=4):
            pass
    finally:
        del engine.migrate_rows
        engine.close()
    return [job.output.outputs[0].token_ids for job in jobs], moved


@functools.cache
def alone(params, kv_dtype=None):
    return answers(engine_for("vanilla", ((1, 240),), kv_dtype), params)[0]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        *((name, PLAIN) for name in ("vanilla", "ngram", "self")),  # and "itself" below
        ("ngram", SAMPLED),
        ("model", SAMPLED),
    ],
)
def test_moves_change_nothing(name, params):
    got, moved = answers(engine_for(name, GROUPS), params)
    assert got == alone(params)
    assert [len(ids) for ids in got] == list(TOKENS)
    assert moved
    assert all(row < to for row, to in moved)


def test_moves_of_an_int8_cache():
    got, moved = answers(engine_for("ngram", GROUPS, "int8"), PLAIN)
    assert got == alone(PLAIN, "int8")
    assert moved


@pytest.mark.parametrize("name", ["ngram", "itself"])
def test_every_committed_position_holds_its_row_s_token(name):
    """The cache of each live row, between any two bursts, against one of a single row that read its ids."""
    engine, single = engine_for(name, GROUPS), engine_for("vanilla", ((1, 240),))
    counted = 0

    def look(engine):
        nonlocal counted
        for row, log in enumerate(engine.rows):
            if log is None or log.num_cached < 2:
                continue
            single.admit(0, Request(log.ids[: log.num_cached], 1))
            for mine, fresh in zip(engine.committed(row), single.committed(0), strict=True):
                for found, want in zip(mine, fresh, strict=True):
                    assert found.shape[1] == log.num_cached
                    np.testing.assert_allclose(found, want, atol=2e-4)
            assert int(engine.runner.state.rows.lengths[row]) == log.num_cached
            assert int(engine.runner.state.rows.pending[row]) == log.ids[-1]
            counted += log.num_cached
            single.release(0)

    try:
        got, moved = answers(engine, PLAIN, look)
    finally:
        single.close()
    assert got == alone(PLAIN)
    assert moved
    assert counted > 1000


def test_a_row_that_finds_no_room_waits():
    """Two long rows outgrow their group, and there is one wide row for them."""
    engine = engine_for("ngram", ((2, 56), (1, 240)))
    waited = []

    def look(engine):
        waited.extend(row for row, log in enumerate(engine.rows) if log is not None and log.paused)

    got, _ = answers(engine, PLAIN, look)
    assert got == alone(PLAIN)
    assert waited


@pytest.mark.parametrize(("name", "kv_dtype"), [("ngram", None), ("model", "int8")])
def test_the_plan_holds_for_every_program(name, kv_dtype):
    engine = engine_for(name, GROUPS, kv_dtype)
    plan, state = engine.plan, engine.programs.abstract_state(engine.plan.shapes.capacities[-1])
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    draft_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.draft_weights))
    assert sum(b.bytes for b in plan.buffers) == TARGET.num_bytes + draft_bytes + state_bytes
    names = []
    for what, lower in lowerings(engine.programs):
        if "greedy" not in what:
            names.append(what)
            figures = compiled_memory(engine.programs.compile(lower()))
            assert figures.aliased >= state_bytes
            assert figures.peak <= plan.peak_bytes
    assert sum(what.startswith("move") for what in names) == 3
    moving = next(p for p in plan.footprint.programs if p.name == "move")
    figures = compiled_memory(engine.programs.compile(engine.programs.move(plan.shapes.capacities[-1], 0, 2)))
    assert figures.extra <= moving.bytes


@dataclasses.dataclass(frozen=True)
class Remembering(Drafter):
    """A drafter with much state and no guess: a megabyte a row."""

    num_nodes: int = 2
    name: str = "remembering"

    def init(self, groups):
        return {"much": jnp.zeros((groups.rows, 2**18), jnp.float32)}

    def observe(self, view, state, rows, tokens, starts, counts):
        return state

    def propose(self, view, state, pending, lengths):
        tokens = jnp.stack([pending, jnp.full_like(pending, NO_TOKEN)], axis=1)
        line = jnp.broadcast_to(jnp.arange(2)[None], tokens.shape)
        return Tree(tokens, jnp.zeros_like(tokens), line), state


@pytest.mark.parametrize("drafter", [Remembering(), *filter(None, DRAFTERS.values())], ids=lambda d: d.name)
def test_move_program_of_a_drafter_s_state_is_priced(drafter):
    plan = lay_out(
        Shapes(TINY, dtype="float32", platform="cpu", batch=4, context=240, drafter=drafter, groups=GROUPS)
    )
    programs = Programs(TARGET, plan.shapes)
    figures = compiled_memory(programs.compile(programs.move(plan.shapes.capacities[-1], 0, 2)))
    (moving,) = (p for p in plan.footprint.programs if p.name == "move")
    assert figures.extra <= moving.bytes
    if isinstance(drafter, Remembering):
        assert moving.bytes >= 2**20 + 4 * TINY.vocab_size


def test_groups_take_less_than_rows_of_one_width():
    grouped = engine_for("ngram", GROUPS).plan
    whole = lay_out(
        Shapes(TINY, dtype="float32", platform="cpu", batch=4, context=240, drafter=NgramDrafter(8))
    )
    (mine,), (theirs,) = (
        [b.bytes for b in plan.buffers if b.name == "target KV"] for plan in (grouped, whole)
    )
    assert mine * 4 * 256 == theirs * (2 * 64 + 128 + 256)
    assert grouped.peak_bytes < whole.peak_bytes


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 60)), min_size=1, max_size=4), st.data())
def test_places_in_groups(sizes, data):
    groups = Groups(tuple(sizes))
    every = [(g, slots) for g, (rows, slots) in enumerate(sizes) for _ in range(rows)]
    assert groups.rows == len(every)
    assert groups.total == sum(slots for _, slots in every)
    row = data.draw(st.integers(0, groups.rows - 1))
    group, first = groups.place(row)
    assert every[row] == (group, groups.slots_of(row))
    assert first == 0 or every[first - 1][0] == group - 1
    with pytest.raises(IndexError):
        groups.place(groups.rows)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.data())
def test_fewer_rows_keep_the_widest(a, b, c, data):
    groups = ((a, 50), (b, 100), (c, 200))
    plan = lay_out(Shapes(TINY, dtype="float32", platform="cpu", batch=a + b + c, context=200, groups=groups))
    batch = data.draw(st.integers(1, a + b + c))
    smaller = plan.resized(None, batch)
    assert smaller.shapes.batch == smaller.shapes.groups_at(256).rows == batch
    assert smaller.shapes.groups_at(256).most == plan.shapes.groups_at(256).most


@pytest.mark.parametrize(
    "groups", [((2, 50), (1, 40)), ((0, 50), (3, 200)), ((2, 50), (2, 200)), ((1, 9), (2, 90))]
)
def test_groups_that_cannot_be(groups):
    with pytest.raises(ConfigError, match="groups"):
        lay_out(Shapes(TINY, dtype="float32", platform="cpu", batch=3, context=200, groups=groups))


@pytest.mark.parametrize("slots_last", [False, True])
def test_a_moved_row_is_written_where_it_belongs(slots_last):
    caches = kv.init_caches(1, Groups(((2, 4), (2, 8))), 1, 2, jnp.dtype("float32"), slots_last)
    (pair,), wide = caches
    pair = jax.tree.map(lambda x: x.at[1].set(jnp.arange(1.0, 9).reshape(x.shape[1:])), pair)
    moved = kv.move_row(((pair,), wide), (0, jnp.int32(1)), (1, jnp.int32(2)), "cpu")
    for before, after in zip(map(kv.plain, pair), map(kv.plain, moved[1][0]), strict=True):
        np.testing.assert_array_equal(after[0, :, :4], before[1])
        assert not after[1].any()
        assert not after[0, :, 4:].any()
