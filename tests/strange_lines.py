"""Lines as strangers write them: any JSON in any field, and one of everything."""

import json
import math
from typing import Any

from hypothesis import strategies as st

SURROGATE = "\ud83d"
HUGE = int("9" * 400)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.sampled_from(["", " ", SURROGATE, "none", "user", "system", "assistant", "\0", "a" * 200]),
)
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.floats(allow_nan=False),
    st.sampled_from([HUGE, -HUGE, 2**63, 2**64, 1e308, 5e-324, 0.0, -1, math.inf]),
)
NAMES = st.one_of(TEXTS, st.sampled_from(["self", "cls", "args", "kwargs", "params", "turns", "seed", "n"]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids", "bad_words", "ignore_eos",
    "skip_special_tokens",
)  # fmt: skip
OPENAI = (
    "model", "n", "stream", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice", "functions",
    "response_format", "max_completion_tokens", "user", "metadata", "echo", "suffix", "best_of",
)  # fmt: skip
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]), "content": TEXTS}
        ),
        st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]), VALUES, max_size=3),
    ),
    max_size=3,
)
PROMPTS = st.one_of(TEXTS, st.lists(st.integers(-1, 300), max_size=5), VALUES)
ASKED = st.one_of(st.fixed_dictionaries({"prompt": PROMPTS}), st.fixed_dictionaries({"messages": MESSAGES}))
MORE = st.dictionaries(st.one_of(st.sampled_from((*SAMPLING, *OPENAI)), NAMES), VALUES, max_size=3)
BODIES = st.builds(lambda asked, more: {**more, **asked}, ASKED, MORE)
# Lines that are right but for one field at most.
FINE = st.fixed_dictionaries(
    {
        "prompt": st.one_of(
            st.text("ab ", min_size=1).map("a".__add__), st.lists(st.integers(1, 90), min_size=1, max_size=5)
        )
    },
    optional={
        "temperature": st.floats(0, 2), "top_p": st.floats(0.1, 1), "top_k": st.integers(-1, 50),
        "seed": st.integers(0, 9), "max_tokens": st.integers(1, 6),
        "stop": st.sampled_from(["b", ["a", "b"], []]),
        "ignore_eos": st.booleans(), "skip_special_tokens": st.booleans(), "min_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2), "repetition_penalty": st.floats(0.5, 2),
    },
)  # fmt: skip
NEARLY = st.builds(
    lambda line, more: {**line, **more},
    FINE,
    st.dictionaries(st.sampled_from((*SAMPLING, *OPENAI, "prompt", "custom_id", "self")), VALUES, max_size=1),
)
BATCH_LINES = st.one_of(
    NEARLY,
    NEARLY.map(lambda body: {"url": "/v1/completions", "body": body}),
    st.builds(lambda body, id: {"custom_id": id, **body}, BODIES, st.one_of(TEXTS, VALUES)),
    st.fixed_dictionaries(
        {
            "custom_id": st.one_of(TEXTS, VALUES),
            "url": st.one_of(st.sampled_from(["/v1/chat/completions", "/v1/completions"]), VALUES),
            "body": st.one_of(BODIES, VALUES),
        },
        optional={"method": st.one_of(st.just("POST"), VALUES)},
    ),
    VALUES,
)
PROMPT_LINES = st.one_of(
    st.builds(
        lambda line, labels: {"prompt": line.pop("prompt"), "params": line, **labels},
        NEARLY,
        st.dictionaries(st.sampled_from(["id", "question_id", "category"]), SCALARS, max_size=1),
    ),
    st.builds(
        lambda asked, labels, params: {**asked, **labels, **params},
        st.one_of(ASKED, st.fixed_dictionaries({"turns": VALUES})),
        st.dictionaries(st.sampled_from(["id", "question_id", "category"]), VALUES, max_size=3),
        st.one_of(st.just({}), st.fixed_dictionaries({"params": st.one_of(VALUES, MORE)})),
    ),
    VALUES,
)


def encoded(value: Any) -> bytes:
    """A value as a line, whatever it holds; infinity as JSON can say it."""
    return json.dumps(value).replace("Infinity", "1e999").encode()


def chat(custom_id: Any, content: Any = "hi", role: Any = "user", **body: Any) -> dict[str, Any]:
    """OpenAI's batch line of one message."""
    return {
        "custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions",
        "body": {"messages": [{"role": role, "content": content}], **body},
    }  # fmt: skip


EVERYTHING: list[Any] = [
    chat("plain", max_tokens=5),
    chat("sampled", temperature=0.8, seed=3, max_tokens=6),
    chat("sampled without a seed", temperature=1, top_p=0.9, max_tokens=6),
    chat("a template that refuses", role="tool"),
    chat("text parts", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], max_tokens=3),
    chat("an image", [{"type": "image_url", "image_url": {"url": "x"}}]),
    chat("developer", role="developer", content="be brief", max_tokens=3),
    chat(
        "neutral",
        n=1,
        stream=False,
        tools=[],
        tool_choice="none",
        logprobs=False,
        logit_bias={},
        max_tokens=4,
    ),
    chat("streams", stream=True),
    chat("tools", tools=[{"type": "function"}]),
    chat("special tokens", skip_special_tokens=False, max_tokens=6),
    chat("no end", ignore_eos=True, max_tokens=9),
    chat("ends", ignore_eos=False, max_tokens=9),
    chat("stops at none", stop="none", max_tokens=4),
    chat("no stop", stop=[], max_tokens=4),
    chat("max_tokens is false", max_tokens=False),
    chat("temperature of 400 digits", temperature=HUGE),
    chat("a very hot one", temperature=1e308, seed=1, max_tokens=3),
    chat("bad words", bad_words=["b"], max_tokens=5),
    chat("bad words, no text", bad_words=[SURROGATE]),
    chat("role, no text", role=SURROGATE),
    chat("content, no text", SURROGATE),
    chat(SURROGATE, max_tokens=3),
    chat("model is a list", model=["x"]),
    chat("another model", model="gpt-4"),
    chat("empty", ""),
    chat("too long", "x" * 400),
    chat("too much", max_tokens=HUGE),
    chat("plain", "a second of this id"),
    {"custom_id": "an unknown key", SURROGATE: 1, "url": "/v1/completions", "body": {"prompt": "a"}},
    {"custom_id": "another url", "url": "/v1/embeddings", "body": {"input": "a"}},
    {"custom_id": "another method", "method": "GET", "url": "/v1/completions", "body": {"prompt": "a"}},
    {"custom_id": "completion", "url": "/v1/completions", "body": {"prompt": "abc", "max_tokens": 4}},
    {"custom_id": "ids", "prompt": [5, 6, 7], "max_tokens": 4},
    {"custom_id": "ids that are none", "prompt": [5, 10**6]},
    {"custom_id": 7, "prompt": "a number for an id"},
    {"prompt": "without an id", "params": {"max_tokens": 2}},
    {"custom_id": "params are false", "prompt": "a", "params": False},
    [1, 2],
    {"custom_id": "last", "messages": [{"role": "user", "content": "bye"}], "max_tokens": 7},
]
