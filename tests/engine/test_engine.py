"""Speculative output equals vanilla's, token for token, whatever the drafter, tree and batch."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scripted_chooser import ScriptedChooser

from specmemo_jax.decode.sampling import MAX_BAD_WORDS
from specmemo_jax.draft import Drafter, DraftModel, NgramDrafter, SelfDrafter, TreeShape
from specmemo_jax.draft.ngram import chain
from specmemo_jax.draft.tree import Tree
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.reading import chunk_starts
from specmemo_jax.engine.request import Request
from specmemo_jax.engine.runner import Runner
from specmemo_jax.llama.packing import pack
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.serve.params import SamplingParams
from specmemo_jax.serve.requests import device_sampling
from specmemo_jax.testing import TINY, tiny_llama

PROMPTS = [np.random.default_rng(i).integers(0, 97, n).tolist() for i, n in enumerate((3, 17, 33, 40, 150))]


@functools.cache
def target_in(dtype):
    return pack(TINY, iter(tiny_llama().items()), jnp.dtype(dtype))


SMALL = dataclasses.replace(TINY, num_layers=1, hidden_size=16, ffn_size=24, num_heads=2, num_kv_heads=1)
STRANGER = pack(SMALL, iter(tiny_llama(SMALL, seed=5).items()), jnp.dtype("bfloat16"))
ITSELF = target_in("float32")
DRAFTERS = {
    "vanilla": None,
    "tree4": NgramDrafter(4),
    "tree8": NgramDrafter(8),
    "tree16": NgramDrafter(16, branches=5),
    "chain2": chain(2),
    "chain8": chain(8),
    "ladder": NgramDrafter(8, ladder=((3, 1), (8, 2)), min_hit_rate=0.35),
    "model, chain": DraftModel.of(STRANGER, TreeShape.of(4)),
    "model, tree": DraftModel.of(STRANGER, TreeShape(9, depth=3, branches=3)),
    "itself, chain": DraftModel.of(ITSELF, TreeShape.of(5)),
    "itself, tree": DraftModel.of(ITSELF, TreeShape(8, depth=4, branches=2)),
    "self, chain": SelfDrafter(1, TreeShape.of(4)),
    "self, tree": SelfDrafter(1, TreeShape(8, depth=3, branches=3)),
}
# Programs take seconds to compile: every drafter greedy in a batch, one of each kind alone, and sampled.
KINDS = ("tree8", "ladder", "model, tree", "self, chain")
GRID = [*((name, 4) for name in DRAFTERS), *((name, 1) for name in KINDS)]
SAMPLED_GRID = [("itself, chain", 4), *((name, 4) for name in KINDS), ("tree8", 1), ("model, tree", 1)]


@functools.cache
def engine_for(drafter, batch, context, dtype, kv_dtype=None):
    """One engine for all tests that ask for the same: a closed one keeps its compiled programs."""
    target = target_in(dtype)
    plan = lay_out(
        Shapes(
            TINY,
            dtype=dtype,
            platform="cpu",
            batch=batch,
            context=context,
            drafter=drafter,
            kv_dtype=kv_dtype,
        )
    )
    return Engine(target, plan)


def generate(
    drafter,
    prompts,
    *,
    batch=1,
    max_tokens=40,
    stop_ids=(),
    sampling=None,
    dtype="float32",
    context=256,
    steps=8,
    kv_dtype=None,
) -> list[Request]:
    """All prompts through an engine, slots refilled as they come free; logs in prompt order.

    ``sampling``: a list of SamplingParams (with seeds), one a prompt.
    """
    engine = engine_for(drafter, batch, context, dtype, kv_dtype)
    waiting, logs = list(range(len(prompts))), {}
    slots: list[int | None] = [None] * batch
    try:
        while waiting or any(slot is not None for slot in slots):
            for row, slot in enumerate(slots):
                if slot is None and waiting:
                    slots[row] = place = waiting.pop(0)
                    engine.admit(
                        row, request(prompts[place], max_tokens, stop_ids, sampling and sampling[place])
                    )
            engine.burst(steps)
            for row, log in enumerate(engine.rows):
                if log is not None and log.finished:
                    logs[slots[row]], slots[row] = engine.release(row), None
    finally:
        engine.close()
    return [logs[i] for i in range(len(prompts))]


def request(prompt, max_tokens, stop_ids, params) -> Request:
    if params is None or params.is_plain:
        return Request(prompt, max_tokens, stop_ids)
    bad_words = np.full(MAX_BAD_WORDS, -1, np.int32)
    bad_words[0, -2:] = 32, 65  # a sequence that vanilla says
    return Request(prompt, max_tokens, stop_ids, device_sampling(params, prompt, params.seed, bad_words))


@pytest.fixture(scope="module")
def vanilla():
    return [log.new_ids for log in generate(None, PROMPTS)]


@dataclasses.dataclass(frozen=True)
class Foresight(Drafter):
    """Knows each row's future and hides it among random nodes of a random tree.

    ``truth[b]`` are the row's right ids. With chance ``p`` a node continues its parent's right
    path, so that paths of every length and slot order get accepted.
    """

    truth: tuple[tuple[int, ...], ...]
    num_nodes: int
    p: float
    seed: int

    def init(self, groups):
        return jnp.zeros((groups.rows, 1), jnp.int32)

    def observe(self, view, state, rows, tokens, starts, counts):
        return state

    def propose(self, view, state, pending, lengths):
        rng = np.random.default_rng(self.seed)
        parents, depths, right = [0], [0], [True]
        for node in range(1, self.num_nodes):
            parent = int(rng.integers(0, node))
            if rng.random() < self.p:
                parent = max(i for i in range(node) if right[i])
            taken = any(right[j] and parents[j] == parent for j in range(1, node))
            parents.append(parent)
            depths.append(depths[parent] + 1)
            right.append(right[parent] and not taken and rng.random() < self.p)
        B = pending.shape[0]
        truth = jnp.asarray(np.array([(*row, *[0] * 256)[:256] for row in self.truth], np.int32))
        at = lengths[:, None] + jnp.asarray(depths)[None]
        known = jnp.take_along_axis(truth, jnp.minimum(at, truth.shape[1] - 1), axis=1)
        wrong = (known + 1 + jnp.arange(self.num_nodes)[None]) % 97
        tokens = jnp.where(jnp.asarray(right)[None], known, wrong).astype(jnp.int32).at[:, 0].set(pending)

        def tile(x):
            return jnp.broadcast_to(jnp.asarray(x, jnp.int32), (B, self.num_nodes))

        return Tree(tokens=tokens, parents=tile(parents), depths=tile(depths)), state


@pytest.mark.parametrize(("name", "batch"), GRID)
def test_equal_to_vanilla(name, batch, vanilla):
    logs = generate(DRAFTERS[name], PROMPTS, batch=batch)
    assert [log.new_ids for log in logs] == vanilla
    for log in logs:
        assert sum(log.accepted_lengths) == len(log.new_ids) - 1


SAMPLED = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {"temperature": 1.0},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 40},
    "min_p": {"min_p": 0.05},
    "repetition": {"temperature": 0, "repetition_penalty": 1.1},
    "frequency": {"temperature": 0.3, "frequency_penalty": 0.3, "presence_penalty": -0.2, "min_tokens": 9},
    "together": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1},
}


@functools.cache
def sampled_vanilla():
    return {name: [log.new_ids for log in sampled(None, 1, fields)] for name, fields in SAMPLED.items()}


def sampled(drafter, batch, fields, order=(0, 1, 2, 3, 4)):
    params = [SamplingParams(seed=2**40 + i, **fields) for i in order]
    prompts = [PROMPTS[i] for i in order]
    return generate(drafter, prompts, batch=batch, max_tokens=24, stop_ids=(32,), sampling=params)


@pytest.mark.parametrize(("name", "batch"), SAMPLED_GRID)
def test_sampled_equal_to_sampled_vanilla(name, batch):
    """Seed by seed the same tokens, whatever is guessed, and whoever sits beside."""
    for fields, want in zip(SAMPLED.values(), sampled_vanilla().values(), strict=True):
        order = (0, 1, 2, 3, 4) if batch == 1 else (3, 0, 4, 2, 1)
        logs = sampled(DRAFTERS[name], batch, fields, order)
        assert [log.new_ids for log in logs] == [want[i] for i in order]


def test_rows_of_many_kinds_do_not_disturb_each_other(vanilla):
    """Greedy rows beside sampled ones say what they say alone, and so do those."""
    names = ["repetition", "together", "top_k"]
    want = [vanilla[0][:24], *(sampled_vanilla()[name][i] for i, name in enumerate(names, 1))]
    params = [None, *(SamplingParams(seed=2**40 + i, **SAMPLED[name]) for i, name in enumerate(names, 1))]
    for drafter in (DRAFTERS["tree8"], DRAFTERS["itself, tree"]):
        logs = generate(drafter, PROMPTS[:4], batch=4, max_tokens=24, sampling=params)
        for log, ids in zip(logs, want, strict=True):
            assert log.new_ids[: len(ids)] == ids


def test_a_draft_that_is_the_target_is_always_right(vanilla):
    """Every chain is accepted to its end, so the draft's cache holds what the target's does; a tree
    holds at least the likeliest token.
    """
    for log in generate(DRAFTERS["itself, chain"], PROMPTS, batch=4, max_tokens=36):
        assert set(log.accepted_lengths) == {5}
    for log in generate(DRAFTERS["itself, tree"], PROMPTS, batch=4, max_tokens=36):
        assert min(log.accepted_lengths[:-1]) >= 2


@pytest.mark.parametrize(("num_nodes", "p", "seed"), [(6, 0.8, 0), (9, 0.8, 1), (12, 0.7, 2), (7, 1.0, 3)])
def test_branches_are_committed_where_they_belong(num_nodes, p, seed, vanilla):
    """Rows accept different paths through interior branches; every later token still fits."""
    prompts, truth = PROMPTS[:4], vanilla[:4]
    full = tuple((*prompt, *new) for prompt, new in zip(prompts, truth, strict=True))
    logs = generate(Foresight(full, num_nodes, p, seed), prompts, batch=4)
    assert [log.new_ids for log in logs] == truth
    lengths = [length for log in logs for length in log.accepted_lengths]
    assert max(lengths) > 2


def test_stop_ids_and_budgets_cut_inside_a_path(vanilla):
    full = tuple((*prompt, *new) for prompt, new in zip(PROMPTS[:4], vanilla[:4], strict=True))
    oracle = Foresight(full, 8, 1.0, 0)
    for stop_ids, max_tokens in (((vanilla[0][5], vanilla[1][9]), 40), ((), 11), ((vanilla[2][0],), 1)):
        want = [log.new_ids for log in generate(None, PROMPTS[:4], max_tokens=max_tokens, stop_ids=stop_ids)]
        for drafter, times in ((oracle, 1), (NgramDrafter(8), 2)):  # twice: every slot is filled again
            prompts = PROMPTS[:4] * times
            logs = generate(drafter, prompts, batch=4, max_tokens=max_tokens, stop_ids=stop_ids)
            assert [log.new_ids for log in logs] == want * times
            for log in logs:
                assert len(log.new_ids) <= max_tokens
                assert not set(log.new_ids[:-1]) & set(stop_ids)
    assert len(generate(None, PROMPTS[:1], stop_ids=(vanilla[0][5],))[0].new_ids) <= 6


def test_up_to_the_last_position_of_the_context():
    """prompt + answer = context, without a slot to spare: the tree hangs over the end, nothing is clamped."""
    prompt = PROMPTS[3]
    (want,) = generate(None, [prompt], max_tokens=TINY.max_context - len(prompt))
    for drafter in (None, NgramDrafter(16, branches=5), chain(8)):
        context = 256 - (1 if drafter is None else drafter.max_depth + 1)
        (log,) = generate(drafter, [prompt], max_tokens=context - len(prompt), context=context)
        assert engine_for(drafter, 1, context, "float32").plan.shapes.capacities == (256,)
        assert len(log.ids) == context
        assert log.new_ids == want.new_ids[: len(log.new_ids)]


def test_growth_of_the_cache_changes_nothing():
    long = [np.random.default_rng(9).integers(0, 97, 200).tolist(), PROMPTS[0]]
    whole = generate(None, long, max_tokens=56, context=256)
    for drafter in (NgramDrafter(8), chain(8)):
        logs = generate(drafter, long, batch=4, max_tokens=56, context=256, steps=3)
        assert [log.new_ids for log in logs] == [log.new_ids for log in whole]


def test_half_precision_runs_and_counts_its_differences():
    """bfloat16 may flip near-ties; a prefix still agrees and every accounting holds."""
    plain = generate(None, PROMPTS, dtype="bfloat16")
    logs = generate(NgramDrafter(8), PROMPTS, dtype="bfloat16", batch=3)
    same = sum(
        a == b for p, q in zip(plain, logs, strict=True) for a, b in zip(p.new_ids, q.new_ids, strict=True)
    )
    assert same >= 0.5 * sum(len(log.new_ids) for log in plain)
    for log in logs:
        assert len(log.new_ids) == 40
        assert sum(log.accepted_lengths) == 39


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 96, 97, 128, 129, 300])
def test_chunks_cover_a_prompt(length):
    plan = chunk_starts(Shapes(TINY, dtype="float32", platform="cpu", context=200), length)
    assert plan[0][0] == 0
    assert all(start + width == following for (start, width), (following, _) in itertools.pairwise(plan))
    assert plan[-1][0] < length <= plan[-1][0] + plan[-1][1]


@pytest.mark.parametrize(("name", "batch"), [("tree8", 4), ("model, tree", 1), ("self, tree", 4)])
def test_drafting_is_exact_over_an_int8_cache(name, batch, vanilla):
    plain = [log.new_ids for log in generate(None, PROMPTS, kv_dtype="int8")]
    drafted = generate(DRAFTERS[name], PROMPTS, batch=batch, kv_dtype="int8")
    assert [log.new_ids for log in drafted] == plain
    assert (
        name == "model, tree" or min(len(log.accepted_lengths) for log in drafted) < 39
    )  # guesses were right
    assert plain != vanilla  # it is lossy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_cache_is_read_about_right(dtype):
    """The same prompt, one step: the logits' order of the float32 cache is kept where it is clear."""
    exact = [log.new_ids[0] for log in generate(None, PROMPTS, max_tokens=1)]
    lossy = [log.new_ids[0] for log in generate(None, PROMPTS, max_tokens=1, dtype=dtype, kv_dtype="int8")]
    assert sum(a == b for a, b in zip(exact, lossy, strict=True)) >= 3


@pytest.mark.parametrize(("waiting", "shortest", "ran"), [(1, 0, 3), (0, 0, 8), (1, 3600, 8)], ids=str)
def test_a_burst_ends_with_the_first_row_where_others_wait(monkeypatch, waiting, shortest, ran):
    monkeypatch.setattr("specmemo_jax.engine.engine.SHORTEST_BURST", shortest)
    engine = engine_for(None, 4, 256, "float32")
    try:
        for row, tokens in enumerate((40, 5)):
            engine.admit(row, Request(PROMPTS[row], tokens))
        engine.burst(1)
        engine.burst(8, waiting)
        long, short = engine.rows[:2]
        assert long
        assert short
        assert len(long.accepted_lengths) == 1 + ran
        assert short.finished
    finally:
        engine.close()


def test_how_long_a_row_will_go_is_told_by_its_pace():
    log = Request([1], 21, ids=[1, 2])
    assert log.steps_to_end(1) == log.steps_to_end(8) == 20
    log.accepted_lengths, log.tree_nodes = [1, 4, 2], [1, 8, 8]
    assert (log.steps_to_end(1), log.steps_to_end(8)) == (20, 7)


def test_steps_in_which_a_gpu_records_its_graph_are_not_timed(monkeypatch):
    monkeypatch.setattr(Runner, "on_gpu", True)
    plan = lay_out(Shapes(TINY, dtype="float32", platform="cpu", batch=1, context=256))
    engine = Engine(target_in("float32"), plan)
    engine.chooser = chooser = ScriptedChooser([1] * 4, most=3)
    engine.admit(0, Request(PROMPTS[0], 12))
    for expected in ([], [], [(1, 3)], [(1, 3), (1, 2)]):
        engine.burst()
        assert chooser.told == expected
    engine.close()
