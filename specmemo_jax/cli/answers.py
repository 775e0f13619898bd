"""Records to answers, turn by turn: the n-th turns of all conversations are decoded together."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from specmemo_jax.errors import RequestError
from specmemo_jax.files.prompts import PromptRecord
from specmemo_jax.llm import LLM
from specmemo_jax.serve.outputs import RequestOutput
from specmemo_jax.serve.params import SamplingParams


@dataclasses.dataclass(frozen=True)
class AnsweredTurn:
    """One finished answer; ``turn`` counts from 1."""

    record: PromptRecord
    turn: int
    params: SamplingParams
    output: RequestOutput


Emit = Callable[[AnsweredTurn], None]


def answer(
    llm: LLM,
    records: Sequence[PromptRecord],
    params: SamplingParams | Sequence[Sequence[SamplingParams]],
    emit: Emit,
    *,
    chat: bool | None = None,
) -> None:
    """Answer every turn of every record and hand each `AnsweredTurn` to ``emit`` as it ends.

    ``params``: one for all, or for each record one for each of its turns. ``chat``: whether
    plain text is put as a user's message; None: if the model has a chat template. Everything
    is checked before the first answer starts, each conversation at the longest that it can become.

    Raises RequestError, naming the record's place.
    """
    open_ones = begin(llm, records, params, chat)
    while open_ones:
        for conversation in open_ones:
            conversation.ask(llm)

        def answered(output: RequestOutput, batch: Sequence[Conversation] = tuple(open_ones)) -> None:
            emit(batch[int(output.request_id)].answered(output, llm.eos_ids))

        asked = [list(c.ids) for c in open_ones], [c.turn_params for c in open_ones]
        llm.generate(*asked, progress=answered)
        open_ones = [c for c in open_ones if not c.is_over]


def begin(
    llm: LLM,
    records: Iterable[PromptRecord],
    params: SamplingParams | Sequence[Sequence[SamplingParams]],
    chat: bool | None,
) -> "list[Conversation]":
    """Every record as a conversation, checked to its end; see `answer`."""
    records = list(records)
    if isinstance(params, SamplingParams):
        params = [[params] * record.num_turns for record in records]
    conversations = [
        Conversation(record, tuple(turns), *_opening(llm, record, chat))
        for record, turns in zip(records, params, strict=True)
    ]
    for conversation in conversations:
        _check(llm, conversation)
    return conversations


@dataclasses.dataclass
class Conversation:
    """How far one record has come: ``ids`` is the whole prompt of its latest question."""

    record: PromptRecord
    params: tuple[SamplingParams, ...]
    ids: list[int]
    messages: list[dict[str, str]]
    turn: int = 0
    _cut: bool = False  # the last answer's ids hold more than its text

    @property
    def turn_params(self) -> SamplingParams:
        """How the latest question is decoded."""
        return self.params[self.turn - 1]

    @property
    def is_over(self) -> bool:
        """Whether the last turn has been asked."""
        return self.turn == self.record.num_turns

    def ask(self, llm: LLM) -> None:
        """Go on to the next turn."""
        if self.turn:
            assert llm.tokenizer is not None
            text = self.record.later_turns[self.turn - 1]
            self.messages.append({"role": "user", "content": text})
            if self._cut:
                self.ids = llm.tokenizer.chat_ids(self.messages)
            else:
                self.ids += llm.tokenizer.next_turn_ids(self.messages)
        self.turn += 1

    def answered(self, output: RequestOutput, eos_ids: Sequence[int]) -> AnsweredTurn:
        """Take the latest turn's answer in."""
        completion = output.outputs[0]
        self._cut = isinstance(completion.stop_reason, str)  # a stop string, read but not said
        ids = completion.token_ids
        ended = ids and (completion.stop_reason == ids[-1] or ids[-1] in eos_ids)
        self.ids += ids[:-1] if ended else ids  # the template closes the answer again
        self.messages.append({"role": "assistant", "content": completion.text})
        return AnsweredTurn(self.record, self.turn, self.turn_params, output)


def _opening(llm: LLM, record: PromptRecord, chat: bool | None) -> tuple[list[int], list[dict[str, str]]]:
    """The ids of a record's first question, and its messages where it is a chat."""
    if record.token_ids is not None:
        return list(record.token_ids), []
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
        return tokenizer.encode(record.text), []
    else:
        messages = [{"role": "user", "content": str(record.text)}]
    try:
        return tokenizer.chat_ids(messages), messages
    except RequestError as error:
        raise RequestError(f"{record.place}: {error}") from error


def _check(llm: LLM, conversation: Conversation) -> None:
    record, vocab, context = conversation.record, llm.config.vocab_size, llm.plan.context
    for token in conversation.ids:
        if token >= vocab:
            raise RequestError(
                f"{record.place}: token id {token} is outside the vocabulary; ids from 0 to {vocab - 1} work"
            )
    params = conversation.params[0]
    try:
        params.end_ids(llm.eos_ids)
    except RequestError as error:
        raise RequestError(f"{record.place}: {error}") from error
    asked = len(conversation.ids)
    messages = conversation.messages
    for text in record.later_turns:  # the answers are not known yet; what stands around them is
        messages = [*messages, {"role": "assistant", "content": "..."}, {"role": "user", "content": text}]
        assert llm.tokenizer is not None
        asked += len(llm.tokenizer.next_turn_ids(messages))
    if params.max_tokens is None and record.num_turns > 1:
        raise RequestError(
            f"{record.place}: {record.num_turns} turns with max_tokens null; a number of tokens works"
        )
    each = params.max_tokens or max(1, params.min_tokens)
    needed = asked + each * record.num_turns
    if needed > context:
        answers = f"{each}" if record.num_turns == 1 else f"{record.num_turns} x {each}"
        larger = ", or a larger --max-context" if context < llm.config.max_context else ""
        raise RequestError(
            f"{record.place}: {asked} prompt tokens and up to {answers} new ones need a context of {needed}, "
            f"this one holds {context}; a shorter prompt, a smaller --max-tokens{larger} works"
        )


def row(answer: AnsweredTurn) -> dict[str, Any]:
    """One answer as a JSON object; times in seconds. ``seed`` is None for greedy answers."""
    record, output = answer.record, answer.output
    completion, metrics = output.outputs[0], output.metrics
    return {
        "id": record.id,
        "line": record.line,
        **record.labels,
        "turn": answer.turn,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": None if answer.params.is_greedy else answer.params.seed,
        "prompt_tokens": len(output.prompt_token_ids),
        "steps": metrics.steps,
        "accepted_lengths": list(metrics.accepted_lengths),
        "mean_accepted_length": round(metrics.mean_accepted_length, 4),
        "tokens_per_second": round(metrics.tokens_per_second, 3),
        "time_to_first_token_s": round(metrics.time_to_first_token_s, 6),
    }


def as_text(answer: AnsweredTurn, *, headed: bool) -> str:
    """Heading, answer and figures, as `streaming` writes them piece by piece."""
    text = answer.output.outputs[0].text.strip()
    return heading(answer.record, answer.turn, headed) + text + "\n" + figures(answer.output)


def heading(record: PromptRecord, turn: int, headed: bool) -> str:
    """The line above an answer, where there is more than one; ``headed``: where there is another prompt."""
    if record.num_turns > 1:
        return f"--- {record.id}, turn {turn}\n"
    return f"--- {record.id}\n" if headed else ""


def figures(output: RequestOutput) -> str:
    """The line below an answer."""
    completion, metrics = output.outputs[0], output.metrics
    return (
        f"[{len(completion.token_ids)} tokens, {completion.finish_reason}; "
        f"{metrics.tokens_per_second:.1f} tokens/s, {metrics.mean_accepted_length:.2f} tokens a step]\n"
    )
