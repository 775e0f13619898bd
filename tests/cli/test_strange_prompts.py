"""Whatever a line of ``generate --prompts`` holds, it is answered or refused by its number."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strange_lines import PROMPT_LINES, encoded

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.cli.answers import answer, as_text, row
from specmemo_jax.cli.sampling import turn_params
from specmemo_jax.cli.streaming import stream_answers
from specmemo_jax.errors import RequestError
from specmemo_jax.files.json_lines import row_of
from specmemo_jax.files.prompts import read_prompts
from specmemo_jax.files.rows import Sink

DEFAULTS = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0, "max_tokens": 3}
GREEDY = SamplingParams(temperature=0, max_tokens=3)
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def llm(tiny_model):
    with LLM(tiny_model, max_context=96, max_batch=2, drafter=None) as model:
        yield model


def records_of(folder, *lines: bytes):
    source = folder / "prompts.jsonl"
    source.write_bytes(b"".join(line + b"\n" for line in lines))
    return read_prompts(source)


@settings(max_examples=300, deadline=None, suppress_health_check=SUPPRESSED)
@given(value=PROMPT_LINES)
def test_read_prompts_of_anything_is_a_record_or_an_error_that_names_the_line(tmp_path_factory, value):
    refused, records = None, []
    try:
        records = records_of(tmp_path_factory.getbasetemp(), encoded(value))
        turn_params(records, DEFAULTS)
    except RequestError as error:
        refused = str(error)
    if refused is not None:
        assert "line 1" in refused
    else:
        assert row_of({"id": records[0].id, **records[0].labels}).endswith("\n")


@settings(max_examples=30, deadline=None, suppress_health_check=SUPPRESSED)
@given(values=st.lists(PROMPT_LINES, min_size=2, max_size=2))
def test_answer_of_anything_is_written_in_both_formats(llm, tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp()
    answers = []
    try:
        records = records_of(folder, *map(encoded, values))
        answer(llm, records, turn_params(records, DEFAULTS), answers.append)
    except RequestError:
        return
    with Sink(str(folder / "out")) as sink:
        for each in answers:
            sink.write(row_of(row(each)))
            sink.write(as_text(each, headed=True))
    assert len(answers) == sum(record.num_turns for record in records)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (rb'{"prompt": "a", "category": 1e999}', "category holds a number that no float can hold"),
        (rb'{"prompt": "a", "category": {"x": [-1e999]}}', "category holds a number"),
        (rb'{"prompt": "a", "params": {"self": 1}}', "SamplingParams has no self"),
        (rb'{"prompt": "a", "params": {"n": true}}', "SamplingParams has no n"),
        (rb'{"prompt": "a", "params": {"bad_words": ["\ud83d"]}}', "bad_words must hold valid Unicode"),
        (rb'{"messages": [{"role": "\ud83d", "content": "a"}]}', "role: not valid Unicode"),
        (b'{"prompt": "a", "params": {"temperature": ' + b"9" * 400 + b"}}", "temperature must be"),
    ],
)
def test_prompts_a_line_that_cannot_be_used_is_refused_by_its_number(tmp_path, line, said):
    with pytest.raises(RequestError, match="line 1") as caught:
        turn_params(records_of(tmp_path, line), DEFAULTS)
    assert said in str(caught.value)


def test_answers_to_an_id_that_is_no_unicode_are_written_in_every_format(llm, tmp_path):
    lines = rb'{"id": "\ud83d", "category": "\ud83d", "prompt": "ab"}', b'{"id": "b", "prompt": "ab"}'
    records = records_of(tmp_path, *lines)
    text, streamed = tmp_path / "text", tmp_path / "streamed"
    with Sink(str(text)) as sink:
        answer(llm, records, GREEDY, lambda a: sink.write(row_of(row(a)) + as_text(a, headed=True)))
    with Sink(str(streamed)) as sink:
        stream_answers(llm, records, [(GREEDY,), (GREEDY,)], sink, chat=None)
    assert b'{"id": "\\ud83d"' in text.read_bytes()
    assert b"--- \\ud83d\n" in text.read_bytes()
    assert streamed.read_bytes().startswith(b"--- \\ud83d\n")
