"""What waits, what runs next, and what the chooser is told of it."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from scripted_chooser import ScriptedChooser

from specmemo_jax.draft import NgramDrafter
from specmemo_jax.draft.ngram import updated_rate
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.engine.scheduler import Scheduler
from specmemo_jax.llama.packing import pack
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.testing import TINY, tiny_llama

PROMPTS = [np.random.default_rng(i).integers(0, 97, 20).tolist() for i in range(5)]
CAREFUL = NgramDrafter(4, branches=1, max_ngram=2, ladder=((4, 2),), min_hit_rate=0.35)
PERIODIC = [5, 6, 7, 8] * 5


@functools.cache
def target():
    return pack(TINY, iter(tiny_llama().items()), jnp.dtype("float32"))


@pytest.fixture
def engine_with():
    made = []

    def make(trees, batch=2):
        plan = lay_out(
            Shapes(TINY, dtype="float32", platform="cpu", batch=batch, context=240, drafter=CAREFUL)
        )
        engine = Engine(target(), plan)
        engine.chooser = ScriptedChooser(trees)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def test_step_tells_the_chooser_how_many_wait(engine_with):
    engine = engine_with([1] * 100)
    scheduler = Scheduler(engine)
    scheduler.add(Request(prompt, 4) for prompt in PROMPTS)
    ended = []
    while scheduler.waiting or any(engine.rows):
        for request in scheduler.step(8):
            if request.finished:
                scheduler.remove(request)
                ended.append(request)
    assert len(ended) == 5
    # Three of five wait while the first two run, which takes two bursts of two steps; then one, then none.
    assert engine.chooser.waiting == [3, 3, 1, 1, 0, 0]


def test_remove_of_a_waiting_or_running_request_frees_its_place(engine_with):
    engine = engine_with([1] * 100, batch=1)
    scheduler = Scheduler(engine)
    first, second, third = (Request(prompt, 50) for prompt in PROMPTS[:3])
    scheduler.add([first, second, third])
    assert scheduler.step(2) == [first]
    scheduler.remove(second)
    scheduler.remove(first)
    assert scheduler.step(2) == [third]
    assert not scheduler.waiting


def rates(engine, row):
    return np.asarray(engine.runner.state.draft.hit_rates.rates)[row].tolist()


def test_burst_after_sleep_near_the_end_of_a_row_keeps_its_hit_rates(engine_with):
    """What was missed ends where a chunk would hang over the row's slots, and is read from further back."""
    engine = engine_with([4] * 4 + [1] * 200, batch=1)
    engine.admit(0, request := Request(PERIODIC, 219))
    for _ in range(4):
        engine.burst()
    learned = rates(engine, 0)
    assert learned != pytest.approx(CAREFUL.initial_hit_rates)
    while len(request.ids) < 238:
        engine.burst()
    assert engine.capacity == 256
    assert request.num_observed < 224 < request.num_cached  # the last chunk of 32 is moved back
    engine._observe_what_was_missed(engine.shapes.tree_nodes, 1)
    assert rates(engine, 0) == learned
    history = np.asarray(engine.runner.state.draft.history)[0]
    assert history[: request.num_cached].tolist() == request.ids[:-1]


def test_burst_after_sleep_tells_the_drafter_of_kept_rows_too(engine_with):
    """A row kept for a chat is drafted for with the others; a hole in its text would count as a miss."""
    engine = engine_with([4] * 3 + [1] * 4 + [4] * 8)
    engine.admit(0, Request(PERIODIC, 200))
    engine.admit(1, kept := Request(PROMPTS[0], 100))
    for _ in range(3):
        engine.burst()
    learned = rates(engine, 1)
    token, position, matched = np.asarray(engine.runner.state.draft.hit_rates.last_guesses)[1].tolist()
    for _ in range(4):
        engine.burst()
    engine.release(1)
    assert kept.num_observed <= position < kept.num_cached
    engine.burst()
    assert kept.num_observed == kept.num_cached
    history = np.asarray(engine.runner.state.draft.history)[1]
    assert history[: kept.num_cached].tolist() == kept.ids[:-1]
    if matched:  # the guess that was open is judged by what came
        learned[matched - 1] = float(
            updated_rate(np.float32(learned[matched - 1]), kept.ids[position] == token)
        )
    assert rates(engine, 1) == pytest.approx(learned)
