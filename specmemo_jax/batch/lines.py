"""Lines of a batch's input: OpenAI's batch lines, and plain ``{"prompt": ...}`` and ``{"messages": ...}``."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from specmemo_jax.errors import RequestError
from specmemo_jax.files.json_lines import NotAnObjectError, read_object
from specmemo_jax.files.prompts import check_messages, check_prompt
from specmemo_jax.serve.params import SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_BOM = b"\xef\xbb\xbf"
_LINE_KEYS = frozenset(("custom_id", "method", "url", "body"))
# Of a body, what asks for nothing of the answer itself.
_NOT_OURS = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options")
)
# Fields of a body that are not served, each with the values at which it changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
}
_EMPTY_IN_MESSAGES = frozenset(("tool_calls", "function_call", "annotations"))
_ROLES = {"developer": "system"}  # OpenAI's newer name


class LineError(RequestError):
    """What is wrong with one line; ``status``: the HTTP status that OpenAI's server would give."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the input, counted from 1.

    ``custom_id``: as given, None where there is none or it cannot be read. Either ``error`` says what
    is wrong, or ``url`` is `CHAT` with ``messages`` or `COMPLETIONS` with a ``prompt``, and ``params``
    are the line's own sampling parameters over the run's; ``has_limit``: max_tokens is the line's own.
    """

    number: int
    custom_id: str | None = None
    url: str = COMPLETIONS
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[dict[str, str], ...] | None = None
    params: SamplingParams | None = None
    has_limit: bool = False
    error: LineError | None = None

    @property
    def key(self) -> str:
        """What a resumed run knows the line by."""
        return line_key(self.custom_id, self.number)


def line_key(custom_id: str | None, number: int) -> str:
    """A line by its custom_id, or by its number where it has none."""
    return f"line {number}" if custom_id is None else f"id {custom_id}"


def read_lines(path: str | Path, names: frozenset[str] | None, defaults: SamplingParams) -> Iterator[Line]:
    """Every line that is not blank, one at a time; bad ones with their ``error``.

    ``names``: what a body may call the model, None for anything. Raises RequestError where the file
    cannot be read.
    """
    first_with: dict[int, int] = {}  # a custom_id's hash to its first line: 100,000 take a few MiB
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    raw = raw.removeprefix(_BOM)
                if not raw.strip():
                    continue
                line = parse_line(raw, number, names, defaults)
                if line.custom_id is not None:
                    before = first_with.setdefault(hash(line.custom_id), number)
                    if before != number:
                        error = LineError(f"custom_id {line.custom_id!r} is line {before}'s already")
                        line = Line(number, error=error)
                yield line
    except OSError as error:
        raise RequestError(
            f"cannot read requests from {path}: {error.strerror}; a JSONL file works"
        ) from error


def parse_line(raw: bytes, number: int, names: frozenset[str] | None, defaults: SamplingParams) -> Line:
    """One line; what is wrong with it becomes its ``error``."""
    try:
        record = read_object(raw)
    except NotAnObjectError as error:
        return Line(number, error=LineError(str(error)))
    return line_of(record, number, names, defaults)


def line_of(
    record: Mapping[str, Any], number: int, names: frozenset[str] | None, defaults: SamplingParams
) -> Line:
    """One line's object; what is wrong with it becomes the line's ``error``."""
    custom_id = None
    try:
        custom_id = _custom_id(record)
        url, body = _url_and_body(record)
        return _request(number, custom_id, url, body, names, defaults)
    except LineError as error:
        return Line(number, custom_id, error=error)
    except RequestError as error:
        return Line(number, custom_id, error=LineError(str(error)))


def _custom_id(record: Mapping[str, Any]) -> str | None:
    found = record.get("custom_id")
    if found is None or isinstance(found, str):
        return found
    raise LineError(f"custom_id must be a text, found {found!r:.60}")


def _url_and_body(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """OpenAI's line has a body; any other line is one, beside its custom_id."""
    if "body" not in record:
        body = {key: value for key, value in record.items() if key != "custom_id"}
        params = body.pop("params", None)
        params = {} if params is None else params
        if not isinstance(params, dict):
            raise LineError('"params" must be an object, such as {"temperature": 0.7}')
        return (CHAT if "messages" in body else COMPLETIONS), {**body, **params}
    if unknown := sorted(record.keys() - _LINE_KEYS):
        raise LineError(f"a batch line has no {', '.join(unknown)}; {', '.join(sorted(_LINE_KEYS))} work")
    if (method := record.get("method")) not in (None, "POST"):
        raise LineError(f"method must be POST, found {method!r:.60}", 405)
    url, body = record.get("url"), record["body"]
    if url not in (CHAT, COMPLETIONS):
        raise LineError(f"url must be {CHAT} or {COMPLETIONS}, found {url!r:.60}", 404)
    if not isinstance(body, dict):
        raise LineError("body must be an object")
    return url, dict(body)


def _request(
    number: int,
    custom_id: str | None,
    url: str,
    body: dict[str, Any],
    names: frozenset[str] | None,
    defaults: SamplingParams,
) -> Line:
    model = body.pop("model", None)
    if model is not None and names is not None and not (isinstance(model, str) and model in names):
        raise LineError(
            f"model {model!r:.80} is not served here; {', '.join(sorted(names))} works "
            "(--served-model-name gives it another name)",
            404,
        )
    limit = any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))
    if url == CHAT:
        messages = check_messages(_plain(body.pop("messages", None)), "messages")
        return Line(
            number, custom_id, url, messages=messages, params=_params(body, defaults), has_limit=limit
        )
    prompt = body.pop("prompt", None)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt):
        raise LineError("a line has one prompt; a line for each works")
    prompt = check_prompt(prompt, "prompt")
    return Line(number, custom_id, url, prompt=prompt, params=_params(body, defaults), has_limit=limit)


def _plain(messages: Any) -> Any:
    """Messages with their text parts joined; what is not text is refused."""
    if not isinstance(messages, list):
        return messages
    plain = []
    for message in messages:
        if not isinstance(message, dict):
            return messages
        rest = {
            key: value
            for key, value in message.items()
            if value is not None and not (key in _EMPTY_IN_MESSAGES and value in ([], {}))
        }
        if unknown := sorted(rest.keys() - {"role", "content"}):
            raise LineError(f"a message may have role and content, found {', '.join(unknown)}")
        content = rest.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise LineError(
                    "a message's content may be a text or text parts; images and sound are not read"
                )
            rest["content"] = "\n".join(parts)  # type: ignore[arg-type]
        if isinstance(rest.get("role"), str):
            rest["role"] = _ROLES.get(rest["role"], rest["role"])
        plain.append(rest)
    return plain


def _params(body: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """A body's sampling parameters over the run's. Only null and absence mean "not given"."""
    given = {
        key: value
        for key, value in body.items()
        if key not in _NOT_OURS and value is not None and not _asks_for_nothing(key, value)
    }
    longest = given.pop("max_completion_tokens", None)
    if longest is not None and given.setdefault("max_tokens", longest) != longest:
        raise LineError(
            f"max_tokens={given['max_tokens']!r:.60} and max_completion_tokens={longest!r:.60} differ"
        )
    if "stream" in given:
        raise LineError("a batch does not stream; stream left out works")
    return dataclasses.replace(defaults, **given)


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field of OpenAI's that is not served here is at what it is when left out."""
    return any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL.get(name, ()))
