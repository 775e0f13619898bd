"""Saved chats: plain JSON with the messages, and beside each the token ids it was."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specmemo_jax.chat.turns import Turn, answer_ids, messages_of, next_prompt
from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.errors import SpecMemoError
from specmemo_jax.serve.text import AnswerText

FORMAT, VERSION = "specmemo-chat", 1


class ChatFileError(SpecMemoError, ValueError):
    """A saved chat that cannot be read, or a place where none can be written."""


@dataclasses.dataclass(frozen=True)
class SavedChat:
    """What a file holds: ``vocabulary`` is `vocabulary_hash` of the tokenizer that made the turns' ids.

    A turn whose ids are not in the file has None in their place in ``ids``, one pair
    (prompt's, answer's) a turn.
    """

    path: str
    model: str
    vocabulary: str
    system: str | None
    turns: tuple[Turn, ...]
    ids: tuple[tuple[tuple[int, ...] | None, tuple[int, ...] | None], ...]


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of which id is which token."""
    vocabulary = json.dumps(sorted(tokenizer.fast.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def write_chat(
    path: str | Path, model: str, tokenizer: Tokenizer, system: str | None, turns: Sequence[Turn]
) -> None:
    """Write a chat, whole or not at all; a saved chat that is there already is replaced.

    Raises ChatFileError where it cannot be written, or where another kind of file would be lost.
    """
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.user, "token_ids": list(turn.prompt_ids)})
        said = {"content": turn.answer, "token_ids": list(turn.answer_ids)}
        messages.append({"role": "assistant", **said, "finish_reason": turn.finish_reason})
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "vocabulary": vocabulary_hash(tokenizer),
        "messages": messages,
    }
    place = Path(os.path.realpath(Path(path).expanduser()))
    _refuse_to_lose(place, str(path))
    partial = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            json.dump(document, file, ensure_ascii=False, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, place)
    except OSError as error:
        raise ChatFileError(f"cannot write {path}: {error.strerror}; another FILE works") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _refuse_to_lose(place: Path, name: str) -> None:
    if not place.exists() or (place.is_file() and place.stat().st_size == 0):
        return
    try:
        read_chat(place)
    except ChatFileError as error:
        raise ChatFileError(f"{name} exists and is not a saved chat; another FILE works") from error


def read_chat(path: str | Path) -> SavedChat:
    """What `write_chat` wrote, checked; the ids may be missing. Raises ChatFileError."""
    place = Path(path).expanduser()
    try:
        if place.exists() and not place.is_file():
            raise ChatFileError(f"{path} is not a file; one that /save wrote works")
        document = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise ChatFileError(f"cannot read {path}: {error.strerror}; a FILE that /save wrote works") from error
    except (ValueError, RecursionError) as error:
        raise ChatFileError(
            f"{path} is damaged or no JSON ({error}); a FILE that /save wrote works"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ChatFileError(f'{path} is not a saved chat (no "format": "{FORMAT}"); /save writes one')
    if document.get("version") != VERSION:
        found = document.get("version")
        raise ChatFileError(f"{path} is of version {found!r} of saved chats; version {VERSION} works")
    messages = document.get("messages")
    if not isinstance(messages, list):
        raise ChatFileError(f'{path} has no list of "messages"')
    checked = [_message(path, number, message) for number, message in enumerate(messages, 1)]
    system = checked.pop(0)["content"] if checked and checked[0]["role"] == "system" else None
    roles = [message["role"] for message in checked]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ChatFileError(
            f"{path}: messages must be user and assistant in turn, an answer last, after at most one system "
            f"message; found {', '.join(message['role'] for message in checked[:6])}"
        )
    turns, ids = [], []
    for asked, said in zip(checked[::2], checked[1::2], strict=True):
        turns.append(Turn(asked["content"], said["content"], (), (), finish_reason=said["finish_reason"]))
        ids.append((asked["token_ids"], said["token_ids"]))
    model, vocabulary = (str(document.get(key, "")) for key in ("model", "vocabulary"))
    return SavedChat(str(path), model, vocabulary, system, tuple(turns), tuple(ids))


def _message(path: str | Path, number: int, message: Any) -> dict[str, Any]:
    place = f"{path}: message {number}"
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise ChatFileError(f'{place} has no "role" of system, user or assistant')
    content, ids = message.get("content"), message.get("token_ids")
    if not isinstance(content, str) or not is_text(content):
        raise ChatFileError(f'{place} has no "content" that is a text')
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
        raise ChatFileError(f'{place}: "token_ids" must be a list of token ids')
    return {
        "role": message["role"],
        "content": content,
        "token_ids": None if ids is None else tuple(ids),
        "finish_reason": str(message.get("finish_reason", "stop")),
    }


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: no half of a surrogate pair in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def restore(
    saved: SavedChat, tokenizer: Tokenizer, model: str, vocab_size: int
) -> tuple[tuple[Turn, ...], list[str]]:
    """The turns with their ids, all below ``vocab_size``, and what had to be done otherwise than saved,
    a line each.

    An answer keeps its saved ids where they are this tokenizer's and spell its text; else it is tokenised.
    Raises RequestError for messages that the chat template refuses.
    """
    notices = []
    same = saved.vocabulary == vocabulary_hash(tokenizer)
    if saved.model != model:
        notices.append(f"the chat was held with {saved.model or 'another model'} and goes on with {model}")
    turns: list[Turn] = []
    tokenised = changed = 0
    for turn, (prompt_saved, answer_saved) in zip(saved.turns, saved.ids, strict=True):
        prompt, whole = next_prompt(tokenizer, saved.system, turns, turn.user)
        changed += same and prompt_saved is not None and prompt_saved != prompt
        ids = answer_saved if same else None
        if ids is None or max(ids, default=0) >= vocab_size or not _spells(tokenizer, ids, turn.answer):
            tokenised += 1
            ids = answer_ids(tokenizer, messages_of(saved.system, turns, turn.user), turn.answer)
        turns.append(dataclasses.replace(turn, prompt_ids=prompt, answer_ids=ids, whole=whole))
    if tokenised:
        why = "another vocabulary" if not same else "their token ids are missing or spell another text"
        notices.append(f"{tokenised} of {len(turns)} answers were tokenised anew ({why})")
    if changed:
        notices.append(
            f"{changed} of {len(turns)} questions are put otherwise than saved (template or texts)"
        )
    return tuple(turns), notices


def _spells(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> bool:
    for skip in (True, False):
        spelled = AnswerText(tokenizer, skip_special_tokens=skip)
        spelled.feed(ids)
        spelled.finish()
        if spelled.text == text:
            return True
    return False
