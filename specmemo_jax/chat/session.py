"""A conversation over an `LLM`: its KV stays across turns, and an answer's ids are never made anew."""

import contextlib
import dataclasses
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Literal, get_args

from specmemo_jax.chat.file import SavedChat, is_text, read_chat, restore, write_chat
from specmemo_jax.chat.stats import ChatStats, memory_used
from specmemo_jax.chat.turns import (
    Turn,
    fit,
    ids_of,
    messages_of,
    rebuilt,
    spoken_ids,
)
from specmemo_jax.errors import ConfigError, RequestError
from specmemo_jax.llm import LLM
from specmemo_jax.serve.outputs import RequestOutput
from specmemo_jax.serve.params import SamplingParams
from specmemo_jax.serve.serve import Job, TextStream

Overflow = Literal["error", "drop-oldest"]
LONGEST_ANSWER = 512  # tokens of an answer without a max_tokens


class ChatSession:
    """A chat with ``llm``: each question prefills only what is new.

    Args:
        llm: its model must have a chat template. Other calls of it may come between two questions, from
            other threads and sessions too; what they take of the cache is read again. After it is closed
            nothing more can be asked, and the chat can still be read and saved.
        system: the system prompt; None: what the template does without one.
        overflow: what happens when question and answer do not fit the context: ``"error"``, or
            ``"drop-oldest"``: whole turns go, the oldest first; the system prompt stays.
        sampling_params: for every answer; None: the model's own. Without ``max_tokens`` an answer has at most
            512 tokens, or what the context leaves.

    Raises:
        RequestError: without a chat template, or for a system prompt that it does not take.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        system: str | None = None,
        overflow: Overflow = "error",
        sampling_params: SamplingParams | None = None,
    ):
        if overflow not in get_args(Overflow):
            raise ConfigError(f"overflow {overflow!r} is not one of {', '.join(get_args(Overflow))}")
        if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
            raise RequestError(f"{llm.name} has no chat template, which a chat needs; another model works")
        self.llm, self.overflow = llm, overflow
        self.tokenizer = llm.tokenizer
        if sampling_params is None:
            sampling_params = dataclasses.replace(llm.get_default_sampling_params(), max_tokens=None)
        self.sampling_params = sampling_params
        self._turns: tuple[Turn, ...] = ()
        self.stream: ChatStream | None = None  # the latest answer's
        self._system: str | None = None
        self._sums = dict.fromkeys((field.name for field in dataclasses.fields(ChatStats)), 0)
        self.system = system

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The questions that were answered, with their answers and ids."""
        if self.stream is not None and self.stream.output is not None:
            self.stream.close()
        return self._turns

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat as ``{"role": ..., "content": ...}``."""
        return messages_of(self.system, self.turns)

    @property
    def ids(self) -> list[int]:
        """Every token id of the chat, up to the last answer's."""
        return ids_of(self.turns)

    @property
    def system(self) -> str | None:
        """The system prompt; setting it keeps the turns, which are read again with the next question."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._idle()
        if text is not None:
            _check_text(text, "the system prompt")
            if text.strip() not in self.tokenizer._render(messages_of(text, (), "question")):
                raise RequestError(
                    f"the chat template of {self.llm.name} does not show a system prompt; "
                    "saying it in the first question works"
                )
        self._turns = rebuilt(self.tokenizer, text, self.turns)
        self._system = text

    def send(self, text: str, sampling_params: SamplingParams | None = None) -> "ChatStream":
        """Ask, and get the answer in pieces. The turn is the chat's once the stream has ended.

        Raises RequestError for what cannot be asked, CapacityError (with ``overflow="error"``, or when
        nothing is left to drop) when question and answer do not fit the context; the chat is as before.
        """
        self._idle()
        return self._begin(self.turns, text, sampling_params)

    def ask(self, text: str, sampling_params: SamplingParams | None = None) -> RequestOutput:
        """`send`, waiting for the whole answer."""
        with self.send(text, sampling_params) as stream:
            for _ in stream:
                pass
        assert stream.output is not None
        return stream.output

    def undo(self) -> Turn:
        """Take the last question and its answer back. Raises RequestError when there is none."""
        self._idle()
        turn = self._last()
        self._turns = self._turns[:-1]
        return turn

    def retry(self, sampling_params: SamplingParams | None = None) -> "ChatStream":
        """Ask the last question again. Its first answer goes when the new one has begun."""
        self._idle()
        turn = self._last()
        return self._begin(self._turns[:-1], turn.user, sampling_params)

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self._idle()
        self._turns = ()

    def save(self, path: str | Path) -> None:
        """Write the chat as JSON (`specmemo_jax.chat.file`), atomically. Raises ChatFileError."""
        write_chat(path, self.llm.name, self.tokenizer, self.system, self.turns)

    def load(self, path: str | Path | SavedChat) -> list[str]:
        """Go on with a saved chat in place of this one; a line each for what is otherwise than saved.

        Raises ChatFileError for a file that is none, RequestError for a chat that the model's template does
        not take; the chat is then as before.
        """
        self._idle()
        saved = path if isinstance(path, SavedChat) else read_chat(path)
        turns, notices = restore(saved, self.tokenizer, self.llm.name, self.llm.config.vocab_size)
        before, self._turns = self._turns, ()
        try:
            self.system = saved.system
        except RequestError:
            self._turns = before
            raise
        self._turns = turns
        return notices

    @property
    def stats(self) -> ChatStats:
        """Where the chat stands and what it has cost."""
        now = {
            "turns": len(self.turns),
            "context_used": len(self.ids),
            "context": self.llm.plan.context,
            "memory_bytes": memory_used(self.llm.engine, self.llm.plan),
            "planned_bytes": self.llm.plan.peak_bytes,
        }
        return ChatStats(**{**self._sums, **now})

    def _last(self) -> Turn:
        if not self.turns:
            raise RequestError("nothing was asked yet")
        return self.turns[-1]

    def _idle(self) -> None:
        """Raises RequestError while an answer is being written."""
        if self.stream is not None and self.stream.is_live:
            raise RequestError(
                "the last answer is still being written; its end, or closing its stream, works"
            )

    def _begin(self, turns: tuple[Turn, ...], text: str, params: SamplingParams | None) -> "ChatStream":
        _check_text(text, "a message")
        if not text.strip():
            raise RequestError("an empty message; a text works")
        params = params or self.sampling_params
        context, drop = self.llm.plan.context, self.overflow == "drop-oldest"
        room = params.max_tokens or max(1, params.min_tokens, min(LONGEST_ANSWER, context // 4))
        kept, prompt, whole = fit(
            self.tokenizer, self.system, turns, text, room, context, drop, self._ways_out()
        )
        ids = [*([] if whole else ids_of(kept)), *prompt]
        if params.max_tokens is None:
            most = min(max(LONGEST_ANSWER, params.min_tokens), context - len(ids))
            params = dataclasses.replace(params, max_tokens=most)
        job = self.llm.job(ids, params, 0)
        job.request.reuse = True
        asked = Turn(text, "", prompt, (), whole)
        self.stream = ChatStream(self, job, asked, kept, turns[: len(turns) - len(kept)])
        return self.stream

    def _ways_out(self) -> list[str]:
        """What works when a question does not fit."""
        plan, most = self.llm.plan, self.llm.config.max_context
        ways = ["a smaller max_tokens (--max-tokens)"]
        if self._turns and self.overflow == "error":
            ways += ["overflow='drop-oldest' (--overflow drop-oldest)", "undo", "clear"]
        else:
            ways += ["a shorter message"]
        if plan.context < most:
            ways.append(f"a larger max_context (the model's own is {most})")
        return ways

    def _record(self, stream: "ChatStream") -> None:
        """Take an answer in that has ended."""
        job, output = stream.job, stream.output
        assert output is not None
        said, params, metrics = output.outputs[0], job.params, output.metrics
        ids = spoken_ids(self.tokenizer, said, job.request.stop_ids, params.skip_special_tokens)
        turn = dataclasses.replace(
            stream.asked, answer=said.text, answer_ids=ids, finish_reason=said.finish_reason
        )
        self._turns = (*stream.kept, turn)
        sums = {
            "dropped_turns": len(stream.dropped),
            "answers": 1,
            "answer_tokens": len(said.token_ids),
            "steps": metrics.steps,
            "decode_s": metrics.decode_s,
            "stepped_tokens": sum(metrics.accepted_lengths),
            "prompt_tokens": len(output.prompt_token_ids),
            "prefilled_tokens": job.request.num_prefilled,
            "full_renders": int(turn.whole and len(self._turns) > 1),
        }
        for name, value in sums.items():
            self._sums[name] += value
        self._sums["last_prefilled"] = job.request.num_prefilled


class ChatStream:
    """An answer that is being written: an iterator over its text pieces; a context manager.

    Its turn is added to the chat when it ends: by itself, or early by `stop`, `close`, the end of a
    ``with`` or Ctrl-C; what was said till then is the answer. An answer that was ended before it began leaves
    the chat as it was. ``dropped``: turns that made room for it.
    """

    def __init__(
        self,
        session: ChatSession,
        job: Job,
        asked: Turn,
        kept: tuple[Turn, ...],
        dropped: tuple[Turn, ...],
    ):
        self.job, self.asked, self.kept, self.dropped = job, asked, kept, dropped
        self._begun = self._ended = False
        self._session, self._stopped = session, threading.Event()
        self._text = TextStream(self._run(), job)

    def _run(self) -> Generator[Job, None, None]:
        with contextlib.closing(self._session.llm.run_jobs([self.job], burst=1)) as running:
            for job in running:
                yield job
                if self._stopped.is_set():
                    self._text.left = True
                    return

    @property
    def is_live(self) -> bool:
        """The answer has begun and not ended."""
        return self._begun and not self._ended and self.output is None

    @property
    def output(self) -> RequestOutput | None:
        """The request's outcome, once it has ended."""
        return self._text.output

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._begun = True
        try:
            return next(self._text)
        except BaseException:  # the end, an error, Ctrl-C: the chat keeps what was said
            self.close()
            raise

    def stop(self) -> None:
        """End the answer after the step that runs now; may be called from a signal handler or a thread."""
        self._stopped.set()

    def close(self) -> None:
        """End the answer; nothing happens if it has ended."""
        self._text.close()
        if not self._ended:
            self._ended = True
            if self.output is not None:
                self._session._record(self)

    def __enter__(self) -> "ChatStream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _check_text(text: str, what: str) -> None:
    if not isinstance(text, str) or not is_text(text):
        raise RequestError(f"{what} must be a text, found {text!r:.60}")
