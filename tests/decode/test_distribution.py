"""What is sampled has the target's own distribution: chi-square over 100,000 draws a drafter.

Two tokens after a fixed prompt are drawn by the engine's own step, thousands of rows with seeds of
their own at once, and counted against the product of the exact filtered distributions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from thorough import only_thorough

from specmemo_jax.decode import step
from specmemo_jax.decode.accept import Accepted
from specmemo_jax.decode.emitted import Emitted, drain
from specmemo_jax.decode.sampling import choose, remember
from specmemo_jax.draft import DraftModel, NgramDrafter, SelfDrafter, TreeShape
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.llama.packing import pack
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.serve.params import SamplingParams
from specmemo_jax.serve.requests import device_sampling, pad_bad_words
from specmemo_jax.testing import TINY, tiny_llama, whole_logits

V = 11
CONFIG = dataclasses.replace(TINY, vocab_size=V, max_context=64)
TARGET = pack(CONFIG, iter(tiny_llama(CONFIG, seed=3).items()), jnp.dtype("float32"))
OTHER = pack(CONFIG, iter(tiny_llama(CONFIG, seed=4).items()), jnp.dtype("float32"))
PROMPT = [1, 2, 3, 4, 1, 2, 5, 1, 2]  # what follows 1 2 has been seen twice
PARAMS = SamplingParams(temperature=0.9, top_p=0.97, top_k=9, seed=0)
ROWS, DRAWS = 4096, 102_400
DRAFTERS = {
    "ngram": NgramDrafter(5),
    "another model": DraftModel.of(OTHER, TreeShape(6, depth=2, branches=3)),
    "itself": DraftModel.of(TARGET, TreeShape.of(3)),
    "self:1": SelfDrafter(1, TreeShape(5, depth=2, branches=2)),
}


logits_of = jax.jit(functools.partial(whole_logits, TARGET))


@functools.cache
def distribution(ids):
    """The filtered next-token distribution after ``ids``, by sorting."""
    padded = np.zeros((1, len(PROMPT) + 2), np.int32)
    padded[0, : len(ids)] = ids
    z = np.asarray(logits_of(TARGET.leaves, padded), np.float64)[0, len(ids) - 1] / PARAMS.temperature
    order = np.argsort(-z)[: PARAMS.top_k]
    p = np.exp(z[order] - z[order[0]])
    kept = order[np.concatenate([[0], np.cumsum(p / p.sum())[:-1]]) < PARAMS.top_p]
    full = np.zeros(V)
    full[kept] = np.exp(z[kept] - z[order[0]])
    return full / full.sum()


def draw(drafter):
    """Counts ``[V, V]`` of the two tokens after the prompt and its pending token, and tokens a step."""
    plan = lay_out(Shapes(CONFIG, dtype=TARGET.dtype.name, platform="cpu", context=48, drafter=drafter))
    engine = Engine(TARGET, plan)
    sampling = device_sampling(PARAMS, PROMPT, 0, pad_bad_words(()))
    pending = engine.admit(0, Request(PROMPT, 30, (), sampling))
    # By NumPy: an operation of JAX would be compiled for each shape.
    state = engine.take_state()
    log = Emitted(np.repeat(state.emitted.log, ROWS, axis=1), state.emitted.slot)
    many = jax.tree.map(lambda leaf: jax.device_put(np.repeat(leaf, ROWS, axis=0)), state)
    many = dataclasses.replace(many, emitted=log)
    one_step = functools.partial(
        step.speculative_step, TARGET, drafter, drafter, step.Chunking(), True, False
    )
    run = jax.jit(one_step).lower(TARGET.leaves, engine.draft_weights, many).compile()
    counts, emitted = np.zeros((V, V)), 0
    for block in range(DRAWS // ROWS):
        keys = jax.device_put(np.stack([np.full(ROWS, block), np.arange(ROWS)], axis=1).astype(np.uint32))
        settings = dataclasses.replace(
            many.rows.settings, sampling=dataclasses.replace(many.rows.settings.sampling, key=keys)
        )
        state = dataclasses.replace(many, rows=dataclasses.replace(many.rows, settings=settings))
        state, _ = run(TARGET.leaves, engine.draft_weights, state)
        state, _ = run(TARGET.leaves, engine.draft_weights, state)
        first, second = drain(state.emitted, 2)
        n, one, two = first[:, 0], first[:, 1:], second[:, 1:]
        np.add.at(counts, (one[:, 0], np.where(n > 1, one[:, min(1, one.shape[1] - 1)], two[:, 0])), 1)
        emitted += int(n.sum())
    engine.close()
    return pending, counts, emitted / DRAWS


def p_value(pending, counts):
    ids = (*PROMPT, pending)
    first = distribution(ids)
    expected = DRAWS * np.stack(
        [first[a] * (distribution((*ids, a)) if first[a] else np.zeros(V)) for a in range(V)]
    )
    assert counts[expected == 0].sum() == 0
    seen, wanted = counts[expected > 0], expected[expected > 0]
    rare = wanted < 8
    seen, wanted = (np.append(x[~rare], x[rare].sum()) for x in (seen, wanted))
    return stats.chi2.sf(((seen - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum(), len(wanted) - 1)


# Each draws from another program, half a minute to compile and run.
USUAL = ("ngram", "itself")
NAMES = [name if name in USUAL else pytest.param(name, marks=only_thorough) for name in DRAFTERS]


@pytest.mark.parametrize("name", NAMES)
def test_distribution_is_the_target_s(name):
    pending, counts, tokens_a_step = draw(DRAFTERS[name])
    assert counts.sum() == DRAWS
    assert tokens_a_step > 1.05  # the drafter was listened to
    assert p_value(pending, counts) > 1e-4


def accept_any_likely_child(tree, logits_at, sampling, history, stop_ids, lengths, live, max_depth):
    """A wrong rule: the first child is taken with its own probability, else the target draws again
    without taking the child out of its distribution.
    """
    rows = jnp.arange(tree.tokens.shape[0])
    root, first_child = logits_at(jnp.zeros_like(rows)), logits_at(jnp.ones_like(rows))
    again = dataclasses.replace(sampling, key=sampling.key + jnp.uint32(1 << 20))
    one = choose(root, sampling, history, stop_ids, lengths + 1)
    child = (tree.parents[:, 1] == 0) & (tree.tokens[:, 1] == one)
    one = jnp.where(child, one, choose(root, again, history, stop_ids, lengths + 1))
    two = choose(first_child, sampling, history, stop_ids, lengths + 2)
    path = jnp.zeros((len(rows), max_depth + 1), jnp.int32).at[:, 1].set(1)
    emitted = jnp.zeros((len(rows), max_depth + 1), jnp.int32).at[:, 0].set(one).at[:, 1].set(two)
    return Accepted(path, emitted, jnp.where(child, 2, 1)), remember(history, one, live)


def test_a_wrong_rule_is_found_out(monkeypatch):
    monkeypatch.setattr(step, "accept_sampled", accept_any_likely_child)
    pending, counts, _ = draw(DRAFTERS["ngram"])
    assert p_value(pending, counts) < 1e-4
