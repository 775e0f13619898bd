import pytest
import typer

from specmemo_jax.cli.sampling import turn_params
from specmemo_jax.errors import RequestError
from specmemo_jax.files.prompts import PromptRecord

OPTIONS = {
    "temperature": 0.8,
    "seed": 10,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "max_tokens": 20,
    "stop": None,
}


def record(place: str = "q.jsonl, line 1", turns: int = 1, **params) -> PromptRecord:
    return PromptRecord(id=1, place=place, text="a", later_turns=("b",) * (turns - 1), params=params)


def seeds(records, **options) -> list[list[int | None]]:
    return [[params.seed for params in turns] for turns in turn_params(records, {**OPTIONS, **options})]


def test_every_answer_has_the_next_seed_unless_its_line_says_one():
    records = [record(turns=2), record(seed=3, turns=2), record(seed=None), record(temperature=0)]
    assert seeds(records) == [[10, 11], [3, 3], [14], [None]]
    assert seeds(records, seed=2**64 - 1)[0] == [2**64 - 1, 0]


def test_without_a_seed_a_run_is_new_and_its_answers_differ():
    (first, second), (third,) = seeds([record(turns=2), record()], seed=None)
    assert first is not None
    assert (second, third) == (first + 1, first + 2)
    assert seeds([record()], seed=None) != [[first]]


def test_a_line_lies_over_the_command_line():
    ((params,),) = turn_params([record(temperature=0.5, stop=["x", "y"])], {**OPTIONS, "stop": ["z"]})
    assert (params.temperature, params.stop, params.max_tokens) == (0.5, ("x", "y"), 20)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temprature": 1}, "line 7: SamplingParams has no temprature"),
        ({"top_p": 2}, "line 7: top_p must be above 0 and at most 1, found 2"),
        ({"temperature": "hot"}, "line 7: temperature must be at least 0, found 'hot'"),
        ({"min_tokens": 30}, "line 7: min_tokens=30 is more than max_tokens=20"),
        ({"n": 2}, "line 7: SamplingParams has no n: a prompt has one answer"),
    ],
)
def test_a_bad_line_is_named(params, message):
    with pytest.raises(RequestError, match=message):
        turn_params([record(), record("q.jsonl, line 7", **params)], OPTIONS)


def test_bad_options_are_wrong_usage():
    with pytest.raises(typer.BadParameter, match="top_p must be above 0 and at most 1, found 0"):
        turn_params([record()], {**OPTIONS, "top_p": 0})


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("seed", 0)])
def test_options_that_a_forgotten_temperature_makes_idle(name, value):
    greedy = {**OPTIONS, "temperature": None, "seed": None}
    assert turn_params([record()], greedy)[0][0].is_greedy
    option = "--" + name.replace("_", "-")
    with pytest.raises(typer.BadParameter, match=f"{option} without --temperature"):
        turn_params([record()], {**greedy, name: value})
    turn_params([record()], {**greedy, name: value, "temperature": 0.0})  # said, so meant
    turn_params([record(), record(temperature=1)], {**greedy, name: value})
