"""Prompts from texts, text files and JSONL, checked whole before a model is loaded."""

import dataclasses
import errno
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specmemo_jax.errors import RequestError
from specmemo_jax.files.json_lines import NotAnObjectError, kind_of, not_unicode, read_object, row_of

FORMATS = (
    '{"prompt": "text" or [token ids]}, {"messages": [{"role": ..., "content": ...}, ...]} '
    'and {"turns": ["first question", ...]} (MT-Bench) work'
)
_KINDS = ("turns", "prompt", "messages")
_LABELS = ("question_id", "category")
_BOM = b"\xef\xbb\xbf"
STDIN = "-"


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """One thing to answer; exactly one of ``text``, ``token_ids`` and ``messages`` is set.

    ``messages`` is the chat before the first answer; ``later_turns`` are the user's texts
    after it, each answered before the next is asked. ``place`` says where it stands, for
    error messages; ``line`` is its line, counted from 1, or None outside a file.
    ``labels`` (question_id, category) are handed on to the answers. ``params`` are the line's
    own sampling parameters by name, still to be checked against `SamplingParams`.
    """

    id: str | int
    place: str
    line: int | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, str], ...] | None = None
    later_turns: tuple[str, ...] = ()
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_turns(self) -> int:
        """Answers that this record asks for."""
        return 1 + len(self.later_turns)


def prompts_from_texts(texts: Iterable[str]) -> list[PromptRecord]:
    """Records of plain prompts, numbered from 1; ``-`` is the text on standard input.

    Raises RequestError for an empty one.
    """
    records = []
    for number, text in enumerate(texts, 1):
        from_stdin = text == STDIN
        place = _name(STDIN) if from_stdin else f"prompt {number}"
        prompt = _text(_read_text(STDIN) if from_stdin else text, place)
        records.append(PromptRecord(id=number, place=place, text=prompt))
    return records


def prompts_from_files(paths: Iterable[str | Path]) -> list[PromptRecord]:
    """One record a text file (``-``: standard input), by the path as given; its last line break is left out.

    Raises RequestError for a file that is missing, empty, or not UTF-8 text.
    """
    return [
        PromptRecord(id=str(path), place=_name(path), text=_text(_read_text(path), _name(path)))
        for path in paths
    ]


def read_prompts(path: str | Path) -> list[PromptRecord]:
    """Every record of a JSONL file (``-``: standard input); blank lines are skipped.

    Raises RequestError for a file that cannot be read or holds nothing, and for the first
    line that is not one of the formats, by its number.
    """
    name = _name(path)
    lines = enumerate(_read(path, "a JSONL file").split(b"\n"), 1)
    records = [_parse_line(line, name, number) for number, line in lines if line.strip()]
    if not records:
        raise RequestError(f"{name} holds no prompts; one JSON object a line is expected: {FORMATS}")
    return records


def _name(path: str | Path) -> str:
    return "standard input" if str(path) == STDIN else str(path)


def _read(path: str | Path, wanted: str) -> bytes:
    """The bytes of a file or of standard input, without a byte order mark."""
    try:
        if str(path) != STDIN:
            raw = Path(path).read_bytes()
        elif sys.stdin is None:
            raise OSError(errno.EBADF, "it is closed")
        else:
            raw = sys.stdin.buffer.read()
    except OSError as error:
        raise RequestError(
            f"cannot read prompts from {_name(path)}: {error.strerror}; "
            f"{wanted}, or - for standard input, works"
        ) from error
    return raw.removeprefix(_BOM)


def _read_text(path: str | Path) -> str:
    raw = _read(path, "a text file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{_name(path)}: not UTF-8 text ({error.reason} at byte {error.start}); a UTF-8 text file works"
        ) from error
    if "\0" in text:
        raise RequestError(
            f"{_name(path)}: not text (a zero at character {text.index(chr(0))}); a UTF-8 text file works"
        )
    return text.removesuffix("\n").removesuffix("\r")  # the editor's, or echo's


def _parse_line(line: bytes, name: str, number: int) -> PromptRecord:
    place = f"{name}, line {number}"
    try:
        record = read_object(line)
    except NotAnObjectError as error:
        raise RequestError(f"{place}: {error}; {FORMATS}") from error
    kinds = [kind for kind in _KINDS if kind in record]
    if len(kinds) != 1:
        found = " and ".join(kinds) or ", ".join(map(repr, list(record)[:5])) or "no key"
        raise RequestError(f"{place}: one of prompt, messages, turns is expected, found {found}; {FORMATS}")
    labels = _labels(record, place)
    value = record[kinds[0]]
    parts = {"turns": _from_turns, "prompt": _from_prompt, "messages": _from_messages}[kinds[0]](value, place)
    return PromptRecord(
        id=_identity(record, number, place),
        place=place,
        line=number,
        labels=labels,
        params=_params(record.get("params"), place),
        **parts,
    )


def _labels(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What is handed on to the answers, refused now where no row could hold it."""
    labels = {key: record[key] for key in _LABELS if key in record}
    for key, value in labels.items():
        try:
            row_of(value)
        except ValueError as error:  # 1e999 is read as infinity, which JSON cannot say
            raise RequestError(
                f"{place}: {key} holds a number that no float can hold, found {value!r:.60}; a text works"
            ) from error
    return labels


def _params(value: Any, place: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(
            f'{place}: "params" must be an object, such as {{"temperature": 0.7, "seed": 3}}, '
            f"found {kind_of(value)}"
        )
    return value


def _identity(record: Mapping[str, Any], number: int, place: str) -> str | int:
    for key in ("question_id", "id"):
        if key in record:
            if not isinstance(record[key], str | int) or isinstance(record[key], bool):
                raise RequestError(f"{place}: {key} must be a string or an integer, found {record[key]!r}")
            return record[key]
    return number


def _from_turns(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, list) or not value:
        raise RequestError(f'{place}: "turns" must be a list of at least one text, found {kind_of(value)}')
    first, *later = (_text(turn, f"{place}, turn {number}") for number, turn in enumerate(value, 1))
    return {"messages": ({"role": "user", "content": first},), "later_turns": tuple(later)}


def _from_prompt(value: Any, place: str) -> dict[str, Any]:
    prompt = check_prompt(value, place)
    return {"text": prompt} if isinstance(prompt, str) else {"token_ids": prompt}


def _from_messages(value: Any, place: str) -> dict[str, Any]:
    return {"messages": check_messages(value, place)}


def check_prompt(value: Any, place: str) -> str | tuple[int, ...]:
    """A text or token ids as a line has them. Raises RequestError, naming the place."""
    if not isinstance(value, list):
        return _text(value, place)
    if not value:
        raise RequestError(f"{place}: the prompt is empty; at least one token id is needed")
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise RequestError(f"{place}: the prompt holds {token!r}; a text, or token ids (integers) work")
    return tuple(value)


def check_messages(value: Any, place: str) -> tuple[dict[str, str], ...]:
    """A conversation that ends with a question, as a line has it. Raises RequestError, naming the place."""
    if not isinstance(value, list) or not value:
        raise RequestError(f'{place}: "messages" must be a list of messages, found {kind_of(value)}')
    messages = []
    for number, message in enumerate(value, 1):
        where = f"{place}, message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(
                f'{where}: {{"role": "user", "content": "..."}} is expected, found {message!r:.60}'
            )
        role = check_unicode(message["role"], f"{where}, role")
        messages.append({"role": role, "content": _text(message.get("content"), where)})
    if messages[-1]["role"] == "assistant":
        raise RequestError(f"{place}: the last message is an assistant's; a user's at the end works")
    return tuple(messages)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{place}: a text is expected, found {kind_of(value)}")
    if not value.strip():
        raise RequestError(f"{place}: the prompt is empty; at least one character is needed")
    return check_unicode(value, place)


def check_unicode(value: str, place: str) -> str:
    """The text. Raises RequestError where it has a lone surrogate, which no tokenizer reads."""
    if (at := not_unicode(value)) is not None:
        raise RequestError(f"{place}: not valid Unicode at character {at}")
    return value
