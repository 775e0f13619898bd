"""Conversations as rows of tokens: which of them the target wrote, and which are held out."""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.errors import RequestError
from specmemo_jax.files.json_lines import NotAnObjectError, read_object

HELD_OUT = 20  # one question in so many


@dataclasses.dataclass(frozen=True)
class Conversation:
    """``ids``: of the whole conversation. ``answers``: where the target's own tokens begin and end, those
    that end a turn included. ``question``: a hash of the first question.
    """

    ids: Sequence[int]
    answers: Sequence[tuple[int, int]]
    question: int


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Conversations side by side in rows: ``tokens`` ``[R, T]`` int32; ``segments`` ``[R, T]`` int32, each
    conversation's number within its row from 1 on, 0 for padding; ``answers`` ``[R, T]`` bool.
    """

    tokens: np.ndarray
    segments: np.ndarray
    answers: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return int(np.count_nonzero(self.segments))


def question_hash(text: str) -> int:
    """64 bits that say which question a text is."""
    return int.from_bytes(hashlib.sha256(" ".join(text.split()).encode()).digest()[:8], "little")


def is_held_out(conversation: Conversation) -> bool:
    """Whether it is for judging, not for training: decided by its question alone."""
    return conversation.question % HELD_OUT == 0


def end_of_turn(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> int:
    """The id that closes an assistant's turn in the chat template, one of ``eos_ids``."""
    user = {"role": "user", "content": "x"}
    closing = tokenizer.next_turn_ids([user, {"role": "assistant", "content": "x"}, user])
    found = next((token for token in closing[:2] if token in eos_ids), None)
    if found is None and not eos_ids:
        raise RequestError("the target has no end token; one with eos_token_id would work")
    return eos_ids[0] if found is None else found


def from_messages(
    messages: Sequence[dict[str, Any]], tokenizer: Tokenizer, end: int, complete: bool = True
) -> Conversation:
    """A chat by the target's own template. ``complete``: its last answer ended by itself."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    users = [message for message in messages if message.get("role") == "user"]
    if not turns or not users or turns[0] == 0:
        raise RequestError("a conversation needs a question and an answer")
    for i in turns:
        if ids:
            following = tokenizer.next_turn_ids(messages[:i])
            ids += following[1:] if following[:1] == [end] else following
        else:
            ids += tokenizer.chat_ids(messages[:i])
        begin = len(ids)
        ids += tokenizer.fast.encode(messages[i]["content"], add_special_tokens=False)
        if complete or i != turns[-1]:
            ids.append(end)
        spans.append((begin, len(ids)))
    return Conversation(ids, spans, question_hash(users[0]["content"]))


def read_jsonl(path: Path, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> list[Conversation]:
    """A file of ``{"messages": [...]}``, one a line; ``"complete": false`` for an answer that was cut short.

    Raises RequestError naming the line.
    """
    end, found = end_of_turn(tokenizer, eos_ids), []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = read_object(line)
                messages = record.get("messages")
                if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
                    raise NotAnObjectError('"messages" must be a list of {"role": ..., "content": text}')
                found.append(from_messages(messages, tokenizer, end, record.get("complete") is not False))
            except (NotAnObjectError, RequestError) as error:
                raise RequestError(f"{path}, line {number}: {error}") from error
    return found


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def save_tokens(path: Path, conversations: Sequence[Conversation]) -> None:
    """A compact file of token ids (.npz), in one move."""
    spans = [(row, *span) for row, c in enumerate(conversations) for span in c.answers]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            ids=np.concatenate([np.asarray(c.ids, np.uint32) for c in conversations]),
            offsets=np.cumsum([0, *(len(c.ids) for c in conversations)], dtype=np.int64),
            answers=np.asarray(spans, np.uint32).reshape(-1, 3),
            questions=np.asarray([c.question for c in conversations], np.uint64),
        )
    temporary.replace(path)


def load_tokens(path: Path) -> list[Conversation]:
    """What `save_tokens` wrote. Raises RequestError for another file."""
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            ids, offsets, answers, questions = (
                file[name] for name in ("ids", "offsets", "answers", "questions")
            )
        spans: list[list[tuple[int, int]]] = [[] for _ in questions]
        for row, begin, end in answers.tolist():
            spans[row].append((begin, end))
        rows = zip(offsets[:-1], offsets[1:], spans, questions.tolist(), strict=True)
        return [Conversation(ids[begin:end].astype(np.int32), span, key) for begin, end, span, key in rows]
    except (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise RequestError(
            f"{path} is no file of training tokens ({error}); a whole one of `specmemo train` would work"
        ) from error


def read_file(path: Path, tokenizer: Tokenizer | None, eos_ids: Sequence[int]) -> list[Conversation]:
    """Conversations of a ``.npz`` or a JSONL file."""
    if path.suffix == ".npz":
        return load_tokens(path)
    if tokenizer is None:
        raise RequestError("the target has no tokenizer, which texts need; a .npz file would work")
    return read_jsonl(path, tokenizer, eos_ids)


@dataclasses.dataclass(frozen=True)
class Cut:
    """What packing left out: tokens beyond a row's end, and conversations without an answer before it."""

    truncated: int
    tokens: int
    dropped: int

    def __str__(self) -> str:
        return f"{self.truncated} truncated by {self.tokens} tokens, {self.dropped} dropped"


def pack_rows(conversations: Iterable[Conversation], length: int) -> tuple[PackedRows, Cut]:
    """Conversations into rows of ``length``, each whole in one row: the longest first, each into the fullest
    row with room for it. Longer ones lose their ends; those whose answers lie beyond it are left out.
    """
    truncated = lost = dropped = 0
    fitting: list[Conversation] = []
    for c in conversations:
        if not any(begin + 1 < length for begin, _ in c.answers):
            dropped += 1
            continue
        if len(c.ids) > length:
            truncated, lost = truncated + 1, lost + len(c.ids) - length
        fitting.append(c)
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rows: list[list[Conversation]] = []
    for c in sorted(fitting, key=lambda c: -len(c.ids)):
        size = min(len(c.ids), length)
        room = next((room for room in range(size, length + 1) if by_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, length
        else:
            row = by_room[room].pop()
        rows[row].append(c)
        by_room[room - size].append(row)
    shape = (len(rows), length)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    answers = np.zeros(shape, bool)
    for row, held in enumerate(rows):
        at = 0
        for number, c in enumerate(held, 1):
            size = min(len(c.ids), length)
            tokens[row, at : at + size] = c.ids[:size]
            segments[row, at : at + size] = number
            for begin, end in c.answers:
                answers[row, at + begin : at + min(end, size)] = True
            at += size
    return PackedRows(tokens, segments, answers), Cut(truncated, lost, dropped)
