import dataclasses

import numpy as np
import pytest

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.errors import CapacityError, ConfigError, RequestError, WeightsError
from specmemo_jax.testing import TINY, tiny_llama

GREEDY = SamplingParams(temperature=0, max_tokens=20)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9] * 5, [90]]


@pytest.fixture(scope="module")
def llm():
    with LLM(TINY, tiny_llama(), max_batch=2) as llm:
        yield llm


def test_speculative_equals_vanilla_and_keeps_the_order(llm):
    with LLM(TINY, tiny_llama(), drafter=None) as vanilla:
        want = vanilla.generate(PROMPTS, GREEDY)
    seen = []
    got = llm.generate(PROMPTS, GREEDY, progress=lambda output: seen.append(output.request_id))
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
    assert [o.request_id for o in got] == ["0", "1", "2"]
    assert sorted(seen) == ["0", "1", "2"]
    for output in got:
        answer, metrics = output.outputs[0], output.metrics
        assert len(answer.token_ids) == 20
        assert answer.finish_reason == "length"
        assert sum(metrics.accepted_lengths) == 19
        assert metrics.steps == len(metrics.accepted_lengths)
        assert metrics.mean_accepted_length == pytest.approx(19 / metrics.steps)
        assert metrics.time_to_first_token_s > 0
        assert metrics.tokens_per_second > 0
    assert all(o.metrics.mean_accepted_length == 1.0 for o in want)


def test_a_stop_id_ends_the_answer_and_is_kept(llm):
    ids = llm.generate(PROMPTS[:1], GREEDY)[0].outputs[0].token_ids
    stop = ids[7]
    answer = llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=20, stop_token_ids=(stop,)))[
        0
    ].outputs[0]
    assert answer.token_ids == ids[: ids.index(stop) + 1]
    assert answer.finish_reason == "stop"


def test_eos_of_the_config_and_ignore_eos(llm):
    ids = llm.generate(PROMPTS[:1], GREEDY)[0].outputs[0].token_ids
    config = dataclasses.replace(TINY, eos_token_ids=(ids[4],))
    with LLM(config, tiny_llama(), max_batch=2) as ending:
        assert ending.eos_ids == (ids[4],)
        assert ending.generate(PROMPTS[:1], GREEDY)[0].outputs[0].finish_reason == "stop"
        ignoring = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        assert ending.generate(PROMPTS[:1], ignoring)[0].outputs[0].token_ids == ids


def test_max_tokens_none_fills_the_context():
    with LLM(TINY, tiny_llama(), max_context=40) as llm:
        output = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=None))[0].outputs[0]
        assert len(output.token_ids) == 37


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ([[]], "prompt 0 is empty"),
        ([[1], [97]], "prompt 1 holds 97"),
        ([[1, -1]], "holds -1"),
        ([[1.5]], "holds 1.5"),
        ([[1] * 250], "250 tokens"),
        ("text", "token ids would work"),
        ([3], "prompt 0 is int"),
    ],
)
def test_prompts_that_cannot_be_served(llm, prompts, named):
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, GREEDY)
    assert named in str(caught.value)
    assert llm.generate([[1, 2]], GREEDY)[0].finished


def test_more_checks_at_the_door(llm):
    with pytest.raises(RequestError, match="2 SamplingParams for 1"):
        llm.generate([[1]], [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="stop ids"):
        llm.generate([[1]], SamplingParams(stop_token_ids=tuple(range(9))))
    with pytest.raises(RequestError, match="empty conversation"):
        llm.chat([])
    assert llm.generate([], GREEDY) == []
    with pytest.raises(ConfigError, match="needs params"):
        LLM(TINY)
    with pytest.raises(ConfigError, match="'float8'"):
        LLM(TINY, tiny_llama(), dtype="float8")  # type: ignore[arg-type]
    with pytest.raises(CapacityError, match="exceeds the model's"):
        LLM(TINY, tiny_llama(), max_context=1000)
    with pytest.raises(CapacityError, match="too small"):
        LLM(TINY, tiny_llama(), memory_budget="1KiB")


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_params_that_do_not_fit_the_config(change):
    params = tiny_llama()
    if change == "missing":
        del params["norm.weight"]
    elif change == "shape":
        params["norm.weight"] = np.ones((33,), np.float32)
    else:
        params["layers.9.mlp.up_proj.weight"] = np.ones((1,), np.float32)
    with pytest.raises(WeightsError, match=r"norm\.weight|layers\.9"):
        LLM(TINY, params)


def test_a_call_that_fails_halfway_leaves_the_engine_usable(llm):
    def fail(output):
        raise KeyboardInterrupt

    want = llm.generate(PROMPTS, GREEDY)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, progress=fail)
    again = llm.generate(PROMPTS, GREEDY)
    assert [o.outputs for o in again] == [o.outputs for o in want]
