"""Rows that keep their cache, drafters that sleep, caches that are lost, baselines: the same tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted_chooser import ScriptedChooser

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.decode.emitted import drain
from specmemo_jax.devices.allocator import is_out_of_memory
from specmemo_jax.draft import DraftModel, NgramDrafter, TreeShape
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.programs import Programs
from specmemo_jax.engine.reading import chunk_of, settings_of
from specmemo_jax.engine.request import Request
from specmemo_jax.engine.runner import Runner
from specmemo_jax.errors import CapacityError, CapacityWarning
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.packing import pack
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import POLICIES, Shapes
from specmemo_jax.mesh.axes import MODEL, model_mesh, sharding
from specmemo_jax.serve.requests import device_sampling
from specmemo_jax.testing import TINY, tiny_llama

TARGET = pack(TINY, iter(tiny_llama().items()), jnp.dtype("float32"))
PROMPT = np.random.default_rng(3).integers(0, 97, 40).tolist()
RUN = Runner.run
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.1, seed=5)
DRAFTERS = {"ngram": NgramDrafter(8), "model": DraftModel.of(TARGET, TreeShape.of(4))}


@functools.cache
def engine_for(name, batch=1, **choices):
    drafter = DRAFTERS.get(name)
    plan = lay_out(
        Shapes(TINY, dtype="float32", platform="cpu", batch=batch, context=200, drafter=drafter, **choices)
    )
    return Engine(TARGET, plan)


def request(prompt, tokens, params=None, **more):
    words = np.full((16, 8), -1, np.int32)
    sampling = None if params is None else device_sampling(params, prompt, params.seed, words)
    return Request(prompt, tokens, sampling=sampling, **more)


def answer(engine, wanted, row=0):
    engine.admit(row, wanted)
    while not (log := engine.rows[row]) or not log.finished:
        engine.burst(3)
    return engine.release(row)


@pytest.fixture(scope="module")
def vanilla():
    """Greedy and sampled answers of plain decoding, by prompt."""
    engine = engine_for("none")

    @functools.cache
    def ids(prompt, tokens, sampled):
        engine.close()
        return answer(engine, request(list(prompt), tokens, SAMPLED if sampled else None)).new_ids

    return lambda prompt, tokens, sampled=False: ids(tuple(prompt), tokens, sampled)


@pytest.mark.parametrize("name", ["ngram", "model"])
@pytest.mark.parametrize("params", [None, SAMPLED], ids=["greedy", "sampled"])
def test_turns_read_only_what_is_new(name, params, vanilla):
    engine = engine_for(name)
    engine.close()
    ids, before = PROMPT, engine.prefilled_tokens
    for turn in range(3):
        log = answer(engine, request(ids, 12, params, reuse=True))
        assert log.new_ids == vanilla(ids, 12, params is not None)
        new = len(PROMPT) if turn == 0 else 1 + 5  # the last token was pending, and five are said anew
        assert engine.prefilled_tokens - before == new
        ids, before = [*log.ids, *range(5)], engine.prefilled_tokens
    shorter = ids[:50]  # as after /undo
    log = answer(engine, request(shorter, 12, params, reuse=True))
    assert log.new_ids == vanilla(shorter, 12, params is not None)
    assert engine.prefilled_tokens - before == 1


@pytest.mark.parametrize("name", ["ngram", "model"])
def test_a_drafter_that_slept_catches_up(name, vanilla):
    drafter = DRAFTERS[name]
    plan = lay_out(Shapes(TINY, dtype="float32", platform="cpu", context=200, drafter=drafter))
    engine = Engine(TARGET, plan)
    order = [plan.tree_nodes, 1, 1, plan.shapes.tree_sizes[1], 1, plan.tree_nodes] * 20
    engine.chooser = ScriptedChooser(order, most=5)
    engine.admit(0, request(PROMPT, 100))
    while not (log := engine.rows[0]) or not log.finished:
        engine.burst()
    log = engine.release(0)
    assert log.new_ids == vanilla(PROMPT, 100)
    assert set(log.tree_nodes) == set(plan.shapes.tree_sizes)
    if name == "model":  # the target itself: whatever it proposes is right, if it knows what was said
        deep = [n for n, nodes in zip(log.accepted_lengths, log.tree_nodes, strict=True) if nodes == 4]
        assert all(n == 4 for n in deep[:-1])


@pytest.mark.parametrize("parts", [{"score_nodes": 3, "logit_nodes": 2}, {"score_nodes": 16}], ids=str)
@pytest.mark.parametrize("params", [None, SAMPLED], ids=["greedy", "sampled"])
def test_passes_by_parts(parts, params, vanilla):
    engine = engine_for("ngram", **parts)
    engine.close()
    assert answer(engine, request(PROMPT, 30, params)).new_ids == vanilla(PROMPT, 30, params is not None)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_the_baselines_say_the_same(policy, vanilla):
    engine = engine_for("ngram", policy=policy)
    engine.close()
    assert answer(engine, request(PROMPT, 30)).new_ids == vanilla(PROMPT, 30)
    assert engine.capacity == engine.plan.shapes.capacities[-1]  # all of it from the first token on
    assert engine.plan.generation_bytes > engine_for("ngram").plan.generation_bytes


def fail_at(monkeypatch, calls):
    """Let the programs run out of memory at these calls, their donated state eaten."""
    count = iter(range(10**6))

    def failing(self, program, *inputs):
        if next(count) in calls:
            self.state = None
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return RUN(self, program, *inputs)

    monkeypatch.setattr(Runner, "run", failing)


def test_a_lost_cache_is_rebuilt_and_the_tokens_stay(monkeypatch):
    params = [SAMPLED, SamplingParams(temperature=0, max_tokens=40), SAMPLED]
    prompts = [PROMPT, PROMPT[:7], PROMPT[5:30]]
    with LLM(TINY, tiny_llama(), drafter=NgramDrafter(4), max_batch=2, max_context=200, seed=1) as llm:
        want = llm.generate(prompts, params)
        llm.engine.close()
        fail_at(monkeypatch, {4, 9, 15})
        with pytest.warns(CapacityWarning) as told:
            got = llm.generate(prompts, params)
        assert [o.outputs for o in got] == [o.outputs for o in want]
        assert [str(w.message).split(": ")[0] for w in told] == [
            "out of device memory; gave up trees of 4 nodes for 2",
            "out of device memory; gave up drafter ngram for plain decoding",
            "out of device memory; gave up 2 rows at once for 1",
        ]
        assert (llm.engine.plan.tree_nodes, llm.engine.plan.batch) == (1, 1)
        assert llm.engine.plan.context == 200
        fail_at(monkeypatch, {0})
        with pytest.raises(CapacityError, match=r"nothing left to give up.*MiB"):
            llm.generate(prompts, params)


def test_other_failures_are_not_taken_for_it():
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: bug"))


def test_a_mesh_says_the_same(vanilla):
    """Tensor parallel over two devices, really run: weights by shards, the cache by KV heads."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, ffn_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        max_context=256,
    )  # fmt: skip
    drafter = NgramDrafter(4)
    plan = lay_out(
        Shapes(config, dtype="float32", platform="cpu", batch=2, context=100, drafter=drafter, shards=2)
    )
    weights = tiny_llama(config)
    prompt, results = [token % 96 for token in PROMPT], []
    for shards in (1, 2):
        target = pack(config, iter(weights.items()), jnp.dtype("float32"), shards=shards)
        mesh = model_mesh(jax.devices()[:shards])
        programs = Programs(target, plan.shapes, mesh)
        prefill = programs.compile(programs.prefill(plan.shapes.capacities[-1], 128))
        step = programs.compile(programs.step(plan.shapes.capacities[-1]))
        arguments = prefill.input_shardings[0]
        state = programs.empty_state(plan.shapes.capacities[-1])
        settings = settings_of(Request(prompt, 30))
        inputs = (*chunk_of(prompt, 128, 0, 1), settings)
        leaves, weights_of, state, *inputs = jax.device_put((target.leaves, (), state, *inputs), arguments)
        cache = jax.tree.leaves(state.caches)[0]
        assert cache.sharding.is_equivalent_to(sharding(mesh, ("batch", "kv_heads")), 4)
        assert cache.addressable_shards[0].data.shape[1] == 2 // mesh.shape[MODEL]
        state, first = prefill(leaves, weights_of, state, *inputs)
        ids = [int(first)]
        for _ in range(12):
            state, _ = step(leaves, weights_of, state)
            count, *tokens = drain(state.emitted, 1)[0, 1].tolist()
            ids += tokens[:count]
        results.append(ids)
    assert results[0] == results[1]
    assert len(results[0]) > 12
