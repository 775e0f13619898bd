"""Stop strings, streams and budgets through the front door: the same however tokens were guessed."""

import dataclasses
import functools

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.checkpoints.open import open_model
from specmemo_jax.draft import DraftModel, NgramDrafter, SelfDrafter, TreeShape
from specmemo_jax.draft.load import open_draft_model
from specmemo_jax.errors import ClosedError, ConfigError, RequestError
from specmemo_jax.testing import TINY, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9] * 5, [90], [30, 31, 30, 31, 30]]


def new_llm(drafter=None, config=TINY, **options):
    """All of one drafter share their programs; only the ladder moves between trees, each a program more."""
    adaptive = isinstance(drafter, NgramDrafter) and bool(drafter.ladder)
    return LLM(config, tiny_llama(), drafter=drafter, max_batch=3, adaptive=adaptive, **options)


@functools.cache
def llm_with(drafter):
    llm = new_llm(drafter)
    llm.tokenizer = TOKENIZER
    return llm


@functools.cache
def drafted():
    target = llm_with(None).target
    return {
        "tree": NgramDrafter(8),
        "ladder": NgramDrafter(6, branches=1, ladder=((3, 1), (6, 2)), min_hit_rate=0.35),
        "itself": DraftModel.of(target, TreeShape.of(4)),
        "self": SelfDrafter(1, TreeShape(5, depth=2, branches=2)),
    }


def test_tokenizer_covers_the_model():
    assert TOKENIZER.vocab_size == TINY.vocab_size


@functools.cache
def plain_answer(i, fields):
    params = SamplingParams(max_tokens=48, seed=i, **dict(fields))
    return llm_with(None).generate([PROMPTS[i]], params)[0].outputs[0]


FIELDS = [
    (("temperature", 0.0),),
    (("temperature", 1.0),),
    (("temperature", 0.6), ("repetition_penalty", 1.2)),
]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_stops_and_budgets_cut_alike(data):
    """Stop strings and characters over tokens and bursts, budgets and ids inside an accepted path."""
    fields = data.draw(st.sampled_from(FIELDS))
    params, want = [], []
    for i in range(len(PROMPTS)):
        text = plain_answer(i, fields).text
        spans = data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 7)), max_size=2))
        stop = tuple(s for at, n in spans if (s := text[at : at + n].strip("\ufffd")))
        ids = data.draw(st.lists(st.sampled_from((0, *plain_answer(i, fields).token_ids[3:])), max_size=1))
        one = SamplingParams(
            max_tokens=data.draw(st.integers(1, 48)), seed=i, stop=stop, stop_token_ids=ids, **dict(fields)
        )
        params.append(one)
        want.append(llm_with(None).generate([PROMPTS[i]], one)[0].outputs[0])
    name = data.draw(st.sampled_from(sorted(drafted())))
    got = llm_with(drafted()[name]).generate(PROMPTS, params)
    assert [output.outputs[0] for output in got] == want
    for output in got:
        answer = output.outputs[0]
        assert sum(output.metrics.accepted_lengths) == len(answer.token_ids) - 1
        assert output.metrics.steps == len(output.metrics.accepted_lengths)
        assert output.finished


@pytest.mark.parametrize("name", [None, "tree", "itself"])
def test_a_stream_is_the_answer(name):
    llm = llm_with(name and drafted()[name])
    for i, fields in enumerate(FIELDS):
        for stop in ((), plain_answer(i, fields).text[9:12] or "none"):
            params = SamplingParams(max_tokens=40, seed=i, stop=stop, **dict(fields))
            (want,) = llm.generate([PROMPTS[i]], params)
            stream = llm.stream(PROMPTS[i], params)
            pieces = list(stream)
            assert all(pieces)
            assert "".join(pieces) == want.outputs[0].text
            assert stream.output is not None
            assert stream.output.outputs == want.outputs


def test_a_stream_that_is_left_early():
    llm = llm_with(drafted()["tree"])
    params = SamplingParams(temperature=0, max_tokens=60)
    whole = llm.generate([PROMPTS[0]], params)[0].outputs[0]
    with llm.stream(PROMPTS[0], params) as stream:
        shown = next(stream) + next(stream)
        assert stream.output is None
        with pytest.raises(RequestError, match="still running"):
            llm.generate([PROMPTS[1]], params)
    assert stream.output is not None
    answer = stream.output.outputs[0]
    assert answer.finish_reason == "abort"
    assert not stream.output.finished
    assert answer.text.startswith(shown)
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert sum(stream.output.metrics.accepted_lengths) == len(answer.token_ids) - 1
    assert llm.generate([PROMPTS[0]], params)[0].outputs[0] == whole


def test_an_interrupt_ends_a_stream_with_what_there_is(monkeypatch):
    llm = llm_with(drafted()["tree"])
    params = SamplingParams(temperature=0, max_tokens=60)
    stream, burst, calls = llm.stream(PROMPTS[0], params), llm.engine.burst, []

    def interrupted(steps, waiting):
        calls.append(steps)
        if len(calls) > 3:
            raise KeyboardInterrupt
        burst(steps, waiting)

    monkeypatch.setattr(llm.engine, "burst", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    monkeypatch.undo()
    assert stream.output is not None
    assert stream.output.outputs[0].finish_reason == "abort"
    assert len(stream.output.outputs[0].token_ids) >= 4
    assert llm.generate([PROMPTS[0]], params)[0].finished


def test_stream_of_a_model_that_is_closed_says_so_and_keeps_what_there_is():
    with LLM(TINY, tiny_llama(), drafter=None) as llm:
        llm.tokenizer = TOKENIZER
        stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0, max_tokens=60))
        next(stream)
    with pytest.raises(ClosedError, match="the model was closed"):
        list(stream)
    assert stream.output is not None
    assert stream.output.outputs[0].finish_reason == "abort"


def test_reasons_are_vllm_s():
    llm = llm_with(drafted()["tree"])
    whole = plain_answer(0, FIELDS[0])

    def reasons(**fields):
        answer = llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=20, **fields))[
            0
        ].outputs[0]
        return answer.finish_reason, answer.stop_reason

    assert reasons() == ("length", None)
    stop = whole.text[9:12]
    assert reasons(stop=stop) == ("stop", stop)
    end = whole.token_ids[4]
    assert reasons(stop_token_ids=[end]) == ("stop", end)
    ended = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[end])
    answer = llm.generate([PROMPTS[0]], ended)[0].outputs[0]
    assert answer.token_ids[-1] == end
    assert answer.text == TOKENIZER.decode(answer.token_ids[:-1])  # the id is kept, its text is not
    with pytest.raises(RequestError, match="stop_token_ids holds 97"):
        llm.generate([[1]], SamplingParams(stop_token_ids=[97]))
    eos = new_llm(config=dataclasses.replace(TINY, eos_token_ids=(whole.token_ids[4],)))
    answer = eos.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    late = SamplingParams(temperature=0, max_tokens=20, min_tokens=12)
    answer = eos.generate([PROMPTS[0]], late)[0].outputs[0]
    assert len(answer.token_ids) >= 12
    assert whole.token_ids[4] not in answer.token_ids[:11]


def test_bad_words_are_never_said():
    llm = llm_with(drafted()["itself"])
    params = SamplingParams(temperature=0, max_tokens=40)
    text = llm.generate([PROMPTS[0]], params)[0].outputs[0].text
    words = [word for word in (text[5:6], text[12:13]) if word.isalpha()]
    assert words
    for word in words:
        clean = llm.generate([PROMPTS[0]], dataclasses.replace(params, bad_words=[word]))[0].outputs[0]
        single = {i for i in range(97) if TOKENIZER.decode([i]) in (word, f" {word}")}
        assert not single & set(clean.token_ids)
    with pytest.raises(RequestError, match="at most 16 of at most 8"):
        llm.generate([[1]], dataclasses.replace(params, bad_words=["abcdefghijklmn"]))


def test_seeds():
    llm = llm_with(drafted()["tree"])
    draws = [
        [
            o.outputs[0].token_ids
            for o in llm.generate(PROMPTS[:1] * 3, SamplingParams(seed=seed, max_tokens=12))
        ]
        for seed in (7, 7, 8)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 1
    free = [o.outputs[0].token_ids for o in llm.generate(PROMPTS[:1] * 3, SamplingParams(max_tokens=12))]
    assert len(set(free)) == 3
    runs = []
    for seed in (1, 1, 2):
        with new_llm(drafted()["tree"], seed=seed) as fresh:
            runs.append(fresh.generate([[1, 2]] * 2, SamplingParams(max_tokens=12)))
    ids = [[o.outputs[0].token_ids for o in run] for run in runs]
    assert ids[0] == ids[1] != ids[2]


def test_what_needs_a_tokenizer_says_so():
    with LLM(TINY, tiny_llama()) as llm:
        for params in (SamplingParams(stop="x"), SamplingParams(bad_words=["x"])):
            with pytest.raises(RequestError, match="without a tokenizer"):
                llm.generate([[1]], params)
        with pytest.raises(RequestError, match="without a tokenizer"):
            llm.stream([1, 2])


def test_draft_models_need_the_target_s_vocabulary():
    target = open_model(TINY, tiny_llama())
    small = dataclasses.replace(TINY, num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1)
    device = jax.devices()[0]
    dtype = llm_with(None).target.dtype

    def open_one(config, tokenizer=None, target=target):
        params = tiny_llama(config, seed=2)
        opened = dataclasses.replace(target, tokenizer=tokenizer) if tokenizer else target
        return open_draft_model(config, opened, TreeShape.of(4), dtype, device.platform, device, params)

    drafter = open_one(small)
    with LLM(TINY, tiny_llama(), drafter=drafter) as llm:
        (output,) = llm.generate([PROMPTS[1]], SamplingParams(temperature=0, max_tokens=30))
        assert output.outputs[0].token_ids == plain_answer(1, FIELDS[0]).token_ids[:30]
        names = [buffer.name for buffer in llm.plan.buffers]
        assert {"draft weights", "draft KV"} <= set(names)
    with pytest.raises(ConfigError, match="has 98 ids, the target's 97"):
        open_one(dataclasses.replace(small, vocab_size=98))


def test_the_first_difference_of_two_vocabularies():
    other = tiny_tokenizer()
    assert TOKENIZER.first_difference(other) is None
    other.fast.add_tokens(["<new>"])
    assert TOKENIZER.first_difference(other) == "id 97 is nothing in the one and '<new>' in the other"


def test_self_drafts_need_fewer_layers_than_the_target():
    with pytest.raises(ConfigError, match="the target has 2 layers"):
        LLM(TINY, tiny_llama(), drafter="self:2")
    with pytest.raises(ConfigError, match="self:0"):
        LLM(TINY, tiny_llama(), drafter="self:0")
    with LLM(TINY, tiny_llama(), drafter="self:1", tree_nodes=3) as llm:
        assert llm.plan.tree_nodes == 3
        (output,) = llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=30))
        assert output.outputs[0].token_ids == plain_answer(0, FIELDS[0]).token_ids[:30]
