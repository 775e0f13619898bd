"""Records to answers, turn by turn: the n-th turns of all conversations are decoded together."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from specmemo_jax.errors import RequestError
from specmemo_jax.llm import LLM
from specmemo_jax.outputs import RequestOutput, SamplingParams
from specmemo_jax.prompts import PromptRecord

Emit = Callable[[PromptRecord, int, RequestOutput], None]


@dataclasses.dataclass
class Conversation:
    """How far one record has come: ``ids`` is the whole prompt of its next answer."""

    record: PromptRecord
    ids: list[int]
    messages: list[dict[str, str]]
    asked: int = 0


def answer(
    llm: LLM, records: Sequence[PromptRecord], params: SamplingParams, emit: Emit, *, chat: bool | None = None
) -> None:
    """Answer every turn of every record and hand each to ``emit(record, turn, output)`` as it ends.

    ``turn`` counts from 1. ``chat``: whether plain text is put as a user's message; None:
    if the model has a chat template. Everything is checked before the first answer starts,
    each conversation at the longest that it can become.

    Raises RequestError, naming the record's place.
    """
    open_ones = [_begin(llm, record, chat) for record in records]
    assert params.max_tokens is not None
    for conversation in open_ones:
        _check(llm, conversation, params.max_tokens)
    while open_ones:
        for conversation in open_ones:
            if conversation.asked:
                conversation.ids += _ask_next(llm, conversation)
            conversation.asked += 1

        def answered(output: RequestOutput, batch: Sequence[Conversation] = tuple(open_ones)) -> None:
            conversation = batch[int(output.request_id)]
            conversation.ids += _without_end(output.outputs[0].token_ids, llm.eos_ids)
            conversation.messages.append({"role": "assistant", "content": output.outputs[0].text})
            emit(conversation.record, conversation.asked, output)

        llm.generate([list(c.ids) for c in open_ones], params, progress=answered)
        open_ones = [c for c in open_ones if c.asked < c.record.num_turns]


def row(record: PromptRecord, turn: int, output: RequestOutput) -> dict[str, Any]:
    """One answer as a JSON object; times in seconds."""
    completion, metrics = output.outputs[0], output.metrics
    return {
        "id": record.id,
        "line": record.line,
        **record.labels,
        "turn": turn,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "steps": metrics.steps,
        "accepted_lengths": list(metrics.accepted_lengths),
        "mean_accepted_length": round(metrics.mean_accepted_length, 4),
        "tokens_per_second": round(metrics.tokens_per_second, 3),
        "time_to_first_token_s": round(metrics.time_to_first_token_s, 6),
    }


def _begin(llm: LLM, record: PromptRecord, chat: bool | None) -> Conversation:
    if record.token_ids is not None:
        return Conversation(record, list(record.token_ids), [])
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise RequestError(
            f'{record.place}: {llm.name} has no tokenizer; {{"prompt": [ids]}} in a --prompts file works'
        )
    if record.messages is not None:
        if chat is False:
            raise RequestError(f"{record.place}: a chat cannot be put --raw; a plain prompt works")
        messages = list(record.messages)
    elif chat is False or (chat is None and not tokenizer.has_chat_template):
        assert record.text is not None
        return Conversation(record, tokenizer.encode(record.text), [])
    else:
        messages = [{"role": "user", "content": str(record.text)}]
    try:
        return Conversation(record, tokenizer.chat_ids(messages), messages)
    except RequestError as error:
        raise RequestError(f"{record.place}: {error}") from error


def _check(llm: LLM, conversation: Conversation, max_tokens: int) -> None:
    record, vocab, context = conversation.record, llm.config.vocab_size, llm.plan.context
    for token in conversation.ids:
        if token >= vocab:
            raise RequestError(
                f"{record.place}: token id {token} is outside the vocabulary; ids from 0 to {vocab - 1} work"
            )
    asked = len(conversation.ids)
    messages = conversation.messages
    for text in record.later_turns:  # the answers are not known yet; what stands around them is
        messages = [*messages, {"role": "assistant", "content": "..."}, {"role": "user", "content": text}]
        assert llm.tokenizer is not None
        asked += len(llm.tokenizer.next_turn_ids(messages))
    needed = asked + max_tokens * record.num_turns
    if needed > context:
        answers = f"{max_tokens}" if record.num_turns == 1 else f"{record.num_turns} x {max_tokens}"
        larger = ", or a larger --max-context" if context < llm.config.max_context else ""
        raise RequestError(
            f"{record.place}: {asked} prompt tokens and up to {answers} new ones need a context of {needed}, "
            f"this one holds {context}; a shorter prompt, a smaller --max-tokens{larger} works"
        )


def _ask_next(llm: LLM, conversation: Conversation) -> list[int]:
    assert llm.tokenizer is not None
    text = conversation.record.later_turns[conversation.asked - 1]
    conversation.messages.append({"role": "user", "content": text})
    return llm.tokenizer.next_turn_ids(conversation.messages)


def _without_end(ids: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """The answer's own ids: the template closes it again."""
    return list(ids[:-1] if ids and ids[-1] in eos_ids else ids)
