import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specmemo_jax.batch.lines import CHAT, COMPLETIONS, Line, parse_line, read_lines
from specmemo_jax.errors import RequestError
from specmemo_jax.serve.params import SamplingParams

NAMES = frozenset(("small",))
DEFAULTS = SamplingParams(temperature=0, max_tokens=7)
ASKED = [{"role": "user", "content": "hi"}]


def parse(record) -> Line:
    raw = record if isinstance(record, bytes) else json.dumps(record).encode()
    return parse_line(raw, 3, NAMES, DEFAULTS)


def chat(**body):
    return {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": ASKED, **body}}


def test_openais_lines():
    line = parse(chat(model="small", max_completion_tokens=5, temperature=0.5, stop=["x"], user="me", n=1))
    assert (line.custom_id, line.url, line.messages, line.key) == ("a", CHAT, tuple(ASKED), "id a")
    assert line.params == SamplingParams(temperature=0.5, max_tokens=5, stop=["x"])
    line = parse({"custom_id": "b", "url": COMPLETIONS, "body": {"prompt": ["once"], "logprobs": None}})
    assert (line.prompt, line.params, line.has_limit) == ("once", DEFAULTS, False)
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]}
    ]
    assert parse(chat(messages=[*parts, *ASKED])).messages == (
        {"role": "system", "content": "be\nkind"},
        *ASKED,
    )


def test_plain_lines():
    line = parse({"prompt": [1, 2], "params": {"seed": 4}, "max_tokens": 2})
    assert (line.prompt, line.custom_id, line.key) == ((1, 2), None, "line 3")
    assert line.params == SamplingParams(temperature=0, max_tokens=2, seed=4)
    assert parse({"messages": ASKED, "custom_id": "c"}).messages == tuple(ASKED)


@pytest.mark.parametrize(
    ("record", "custom_id", "status", "message"),
    [
        (b"{", None, 400, "not JSON"),
        (b"\xff{}", None, 400, "not UTF-8"),
        (b"[" * 100_000, None, 400, "nested too deeply"),
        ([1], None, 400, "an object is expected|object is expected"),
        ({"custom_id": 5, "prompt": "x"}, None, 400, "custom_id must be a text"),
        ({"custom_id": "a"}, "a", 400, "prompt"),
        ({"custom_id": "a", "body": {}, "url": "/v1/embeddings"}, "a", 404, "/v1/completions"),
        ({"custom_id": "a", "body": {}, "url": CHAT, "method": "GET"}, "a", 405, "POST"),
        ({"custom_id": "a", "body": [], "url": CHAT}, "a", 400, "body must be an object"),
        ({"custom_id": "a", "body": {}, "url": CHAT, "extra": 1}, "a", 400, "has no extra"),
        (chat(model="other"), "a", 404, "small works"),
        (chat(temperature=-1), "a", 400, "temperature must be"),
        (chat(tools=[{"type": "function"}]), "a", 400, "no tools"),
        (chat(n=2), "a", 400, "one answer"),
        (chat(stream=True), "a", 400, "does not stream"),
        (chat(logprobs=True), "a", 400, "logits stay"),
        (chat(max_tokens=3, max_completion_tokens=4), "a", 400, "differ"),
        (chat(messages=[]), "a", 400, "list of messages"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "a", 400, "images"),
        (chat(messages=[{**ASKED[0], "tool_call_id": "1"}]), "a", 400, "tool_call_id"),
        ({"prompt": ["a", "b"]}, None, 400, "one prompt"),
        ({"prompt": ""}, None, 400, "empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_its_error(record, custom_id, status, message):
    line = parse(record)
    assert line.error is not None
    assert (line.custom_id, line.error.status, line.number) == (custom_id, status, 3)
    with pytest.raises(RequestError, match=message):
        raise line.error


def test_reading_skips_blank_lines_and_refuses_a_second_of_an_id(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"custom_id": "a", "prompt": "x"}\n\n{"custom_id": "a", "prompt": "y"}')
    first, second = read_lines(path, NAMES, DEFAULTS)
    assert (first.prompt, first.number, second.number, second.custom_id) == ("x", 1, 3, None)
    assert "line 1's already" in str(second.error)
    with pytest.raises(RequestError, match=r"none.jsonl: No such file.*; a JSONL file works"):
        list(read_lines(tmp_path / "none.jsonl", NAMES, DEFAULTS))


TEXT = st.sampled_from(["", "a", "é", "user", "role", "content", "\x00"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["custom_id", "prompt", "messages", "body", "url", "params", "stop", "n"])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=20) | st.dictionaries(KEYS, JSON, max_size=4).map(lambda x: json.dumps(x).encode()))
def test_any_line_is_a_request_or_an_error(raw):
    line = parse(raw)
    assert (line.error is None) == (line.params is not None)
