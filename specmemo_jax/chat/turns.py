"""The turns of a chat as token ids: a template's are appended, an answer's own stay as they came."""

import dataclasses
from collections.abc import Sequence

from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.errors import CapacityError, RequestError
from specmemo_jax.serve.outputs import CompletionOutput


@dataclasses.dataclass(frozen=True)
class Turn:
    """What the user said and what was answered.

    ``prompt_ids``: what stands between the answer before (its closing included) and this one.
    ``answer_ids``: as generated, without the id that ended it, which the template writes again.
    ``whole``: ``prompt_ids`` stand for all that came before, as in a first turn, and in every turn of
    a template that rewrites what was said.
    """

    user: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    whole: bool = False
    finish_reason: str = "stop"


def messages_of(system: str | None, turns: Sequence[Turn], text: str | None = None) -> list[dict[str, str]]:
    """The chat as ``{"role": ..., "content": ...}``, the question ``text`` last."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages if text is None else [*messages, {"role": "user", "content": text}]


def ids_of(turns: Sequence[Turn]) -> list[int]:
    """Every id of the chat, up to its last answer's."""
    ids: list[int] = []
    for turn in turns:
        ids = [*([] if turn.whole else ids), *turn.prompt_ids, *turn.answer_ids]
    return ids


def next_prompt(
    tokenizer: Tokenizer, system: str | None, turns: Sequence[Turn], text: str
) -> tuple[tuple[int, ...], bool]:
    """The ids that put the question ``text`` after ``turns``, and whether they stand for the turns too.

    They do in a first turn, and where the template does not keep what was said (see `keeps_history`).
    Raises RequestError for messages that the template refuses.
    """
    messages = messages_of(system, turns, text)
    if turns and keeps_history(tokenizer, messages):
        return tuple(tokenizer.next_turn_ids(messages)), False
    return tuple(tokenizer.chat_ids(messages)), True


def keeps_history(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> bool:
    """Whether the template only appends to what it rendered for the question before; ``messages`` end
    ``user, assistant, user``.

    True where rendering all of them gives, to the letter: the rendering up to the question before; white
    space, which the model then says itself; the answer as it is, but for white space around it; and
    the same that follows any other answer. Otherwise a cache of the turns before could not go on.
    """
    before, answer = tokenizer._render(messages[:-2]), messages[-2]["content"]
    mark = tokenizer._unused_word(messages)
    marked = tokenizer._render([*messages[:-2], {**messages[-2], "content": mark}, messages[-1]])
    if not marked.startswith(before):
        return False
    lead, found, after = marked[len(before) :].partition(mark)
    if not found or lead.strip() or mark in after:
        return False
    if not answer.strip():
        return True
    shown = tokenizer._render(messages)
    rest = shown[len(before) :]
    return (
        shown.startswith(before)
        and rest.endswith(after)
        and rest[: len(rest) - len(after)].strip() == answer.strip()
    )


def without_oldest(
    tokenizer: Tokenizer, system: str | None, turns: Sequence[Turn], count: int
) -> tuple[Turn, ...]:
    """The chat without its first ``count`` turns; the others keep their answers' ids. Raises RequestError."""
    kept = tuple(turns[count:])
    if any(turn.whole for turn in kept[1:]):
        return rebuilt(tokenizer, system, kept)
    if not kept:
        return ()
    prompt, whole = next_prompt(tokenizer, system, (), kept[0].user)
    return dataclasses.replace(kept[0], prompt_ids=prompt, whole=whole), *kept[1:]


def fit(
    tokenizer: Tokenizer,
    system: str | None,
    turns: Sequence[Turn],
    text: str,
    room: int,
    context: int,
    drop: bool,
    ways_out: Sequence[str],
) -> tuple[tuple[Turn, ...], tuple[int, ...], bool]:
    """The turns that stay before the question ``text``, and its `next_prompt`, so that prompt and ``room``
    tokens more fit a context of ``context``; ``drop``: the oldest turns may go, as few as need be.

    Raises CapacityError with the figures, and ``ways_out``, where they do not fit.
    """
    before = len(ids_of(turns))
    for count in range(len(turns) + 1):
        kept = without_oldest(tokenizer, system, turns, count) if count else tuple(turns)
        prompt, whole = next_prompt(tokenizer, system, kept, text)
        length = len(prompt) + (0 if whole else len(ids_of(kept)))
        if length + room <= context:
            return kept, prompt, whole
        if not drop:
            break
    alone = f" with all {count} turns dropped" if count else ""
    raise CapacityError(
        f"the context of {context} tokens is full: the chat holds {before}, with this message{alone} the "
        f"prompt has {length}, its answer needs room for {room}, {length + room - context} too many; "
        f"nothing was cut; what works: {', '.join(ways_out)}"
    )


def rebuilt(tokenizer: Tokenizer, system: str | None, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns with the template's ids made anew, and the answers' as they are. Raises RequestError."""
    done: tuple[Turn, ...] = ()
    for turn in turns:
        prompt, whole = next_prompt(tokenizer, system, done, turn.user)
        done = (*done, dataclasses.replace(turn, prompt_ids=prompt, whole=whole))
    return done


def spoken_ids(
    tokenizer: Tokenizer, completion: CompletionOutput, end_ids: Sequence[int], skip_special_tokens: bool
) -> tuple[int, ...]:
    """The ids of what an answer says: without the id that ended it, and without a stop string.

    A stop string may begin inside a token: what the text has of that token is then tokenised, alone.
    """
    ids, text = completion.token_ids, completion.text
    if completion.finish_reason != "stop":
        return ids
    if not isinstance(completion.stop_reason, str):
        return ids[:-1] if ids and ids[-1] in end_ids else ids
    count = len(ids)
    while not text.startswith(said := tokenizer.decode(ids[:count], skip_special_tokens)):
        count -= 1  # at 0 nothing is said, which every text starts with
    return (*ids[:count], *inner_ids(tokenizer, text[len(said) :]))


def inner_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of ``text`` as it stands inside another text: no space of its own in front."""
    mark = tokenizer._unused_word([{"content": text}])
    alone, together = tokenizer._plain_ids(mark), tokenizer._plain_ids(mark + text)
    inside = together[: len(alone)] == alone
    return tuple(together[len(alone) :] if inside else tokenizer._plain_ids(text))


def answer_ids(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], answer: str) -> tuple[int, ...]:
    """Ids for an answer whose own are not known, as the template shows it after ``messages``, which end with
    the question. Raises RequestError.
    """
    before = tokenizer._render(messages)
    mark = tokenizer._unused_word([*messages, {"content": answer}])
    question = {"role": "user", "content": mark[::-1]}
    try:
        shown = tokenizer._render([*messages, {"role": "assistant", "content": mark}, question])
    except RequestError:
        return inner_ids(tokenizer, answer)
    lead = shown[len(before) :].partition(mark)[0] if shown.startswith(before) else ""
    lead = "" if lead.strip() else lead
    opening, whole = tokenizer._plain_ids(before), tokenizer._plain_ids(before + lead + answer)
    if whole[: len(opening)] == opening:
        return tuple(whole[len(opening) :])
    return inner_ids(tokenizer, lead + answer)
