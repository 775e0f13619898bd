"""Log probabilities of given tokens, against logits that are computed at once."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.draft import NgramDrafter
from specmemo_jax.engine.engine import Engine
from specmemo_jax.errors import CapacityError, RequestError
from specmemo_jax.llama.packing import pack
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.testing import TINY, tiny_llama, whole_logits

TARGET = pack(TINY, iter(tiny_llama().items()), jnp.dtype("float32"))
IDS = np.random.default_rng(3).integers(0, 97, 230).tolist()


@functools.cache
def llm(batch=2, kv_cache_dtype: Literal["auto", "int8"] = "auto"):
    return LLM(
        TINY, tiny_llama(), drafter=NgramDrafter(4), max_batch=batch, scoring=True,
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip


@jax.jit
def log_softmax(leaves, ids):
    """At every position, without a cache."""
    return jax.nn.log_softmax(whole_logits(TARGET, leaves, ids), axis=-1)


def expected(ids):
    """Of each id but the first: its log probability, and whether it is the likeliest."""
    T = len(ids)
    padded = np.zeros((1, TINY.max_context), np.int32)  # one length, one program
    padded[0, :T] = ids
    z = np.asarray(log_softmax(TARGET.leaves, padded))[0, :T]
    following = np.asarray(ids[1:])
    return z[np.arange(T - 1), following], z[:-1].argmax(-1) == following


@pytest.mark.parametrize(("length", "begin"), [(2, 1), (3, 2), (33, 1), (129, 100), (200, 3), (230, 229)])
def test_scores_are_the_logits(length, begin):
    ids = IDS[:length]
    found, likeliest = llm().log_likelihoods(ids, begin)
    want, top = expected(ids)
    np.testing.assert_allclose(found, want[begin - 1 :], atol=1e-4)
    assert likeliest.tolist() == top[begin - 1 :].tolist()
    assert len(found) == length - begin


def test_what_was_read_is_not_read_again():
    """Answers to one question share its cache; another call in between spoils nothing."""
    model = llm()
    question = IDS[:150]
    for ending in ([1, 2, 3], [1, 2, 9, 9], [5], IDS[150:190]):
        found, _ = model.log_likelihoods([*question, *ending], 150)
        np.testing.assert_allclose(found, expected([*question, *ending])[0][149:], atol=1e-4)
        if len(ending) == 1:
            (output,) = model.generate([question], SamplingParams(temperature=0, max_tokens=6))
            greedy = output.outputs[0].token_ids
            found, likeliest = model.log_likelihoods([*question, *greedy], 150)
            assert likeliest.all()


def test_the_plan_has_its_row():
    plan = llm().plan
    names = {program.name for program in plan.footprint.programs}
    assert {f"score {width}" for width in plan.shapes.chunks} <= names
    for batch, kv_dtype in ((1, None), (3, None), (3, "int8")):
        plan = lay_out(
            Shapes(TINY, "float32", "cpu", TINY.max_context, batch, kv_dtype=kv_dtype, scoring=True)
        )
        programs = Engine(TARGET, plan).programs
        for width in plan.shapes.chunks:
            figures = compiled_memory(programs.compile(programs.score(plan.shapes.capacities[-1], width)))
            priced = next(p for p in plan.footprint.programs if p.name == f"score {width}")
            assert figures.extra <= priced.bytes
            assert figures.peak <= plan.peak_bytes


def test_an_int8_cache_scores_about_the_same():
    exact, _ = llm().log_likelihoods(IDS)
    lossy, _ = llm(1, "int8").log_likelihoods(IDS)
    assert 0 < np.abs(exact - lossy).max() < 0.5


def test_what_cannot_be_scored():
    with pytest.raises(RequestError, match="begin 5 of 3"):
        llm().log_likelihoods([1, 2, 3], 5)
    with pytest.raises(RequestError, match="holds 97"):
        llm().log_likelihoods([1, 97])
    with pytest.raises(RequestError, match="begin 1 of 1"):
        llm().log_likelihoods([1])
    with pytest.raises(RequestError, match="the context holds 256"):
        llm().log_likelihoods([1] * 300)
    with LLM(TINY, tiny_llama(), drafter=None) as plain, pytest.raises(CapacityError, match="scoring=True"):
        plain.log_likelihoods([1, 2])
