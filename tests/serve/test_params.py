import dataclasses

import pytest

from specmemo_jax import SamplingParams
from specmemo_jax.errors import RequestError


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "'hot'"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is more than max_tokens=4"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list"),
        ({"stop": ""}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stop": {"a": 1}}, "stop must be a list"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"n": 2}, "has no n: a prompt has one answer"),
        ({"logprobs": 1}, "has no logprobs"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty"),
        ({"temprature": 1}, "has no temprature: .*temperature"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, named):
    with pytest.raises(RequestError, match=named):
        SamplingParams(**fields)


def test_lists_and_single_strings():
    params = SamplingParams(stop="END", bad_words=["a", "b"], stop_token_ids=[1, 2])
    assert params.stop == ("END",)
    assert params.bad_words == ("a", "b")
    assert params.end_ids((2, 7)) == (2, 7, 1)
    assert SamplingParams(stop=None, stop_token_ids=None, ignore_eos=True).end_ids((2,)) == ()
    with pytest.raises(RequestError, match="stop ids"):
        SamplingParams(stop_token_ids=range(9)).end_ids(())


def test_fields_that_ask_for_nothing_are_let_through():
    assert SamplingParams(n=1, logprobs=None, use_beam_search=False) == SamplingParams()  # type: ignore[call-arg]


def test_plain_is_only_what_changes_nothing():
    greedy = SamplingParams(temperature=0)
    assert greedy.is_plain
    assert greedy.is_greedy
    assert dataclasses.replace(greedy, top_p=0.5, top_k=3, seed=1, stop="x").is_plain
    changes = (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"min_tokens": 1},
        {"bad_words": ["x"]},
    )
    for change in changes:
        assert not dataclasses.replace(greedy, **change).is_plain
    assert not SamplingParams().is_greedy
