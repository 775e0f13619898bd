"""The loop of ``specmemo chat``: commands, answers as they come, one line of figures after each."""

import dataclasses
import os
import sys
from collections.abc import Callable

from specmemo_jax.chat.session import ChatSession, ChatStream
from specmemo_jax.chat.stats import ChatStats
from specmemo_jax.cli.chat_input import LineReader, Said
from specmemo_jax.cli.failures import describe
from specmemo_jax.cli.streaming import _stripped
from specmemo_jax.errors import RequestError, SpecMemoError
from specmemo_jax.files.rows import Sink, first_interrupt
from specmemo_jax.serve.outputs import RequestOutput
from specmemo_jax.serve.params import SamplingParams

HELP = '''\
/help          this list
/clear         forget all turns; the system prompt stays
/undo          take the last question and its answer back
/retry         answer the last question again
/system TEXT   set the system prompt; alone: show it; "" removes it
/save FILE     write the chat as JSON
/load FILE     go on with a saved chat
/stats         what the chat holds and has cost
/plan          the memory plan
/exit          end; /quit, /bye and Ctrl-D too
"""text"""     a text of many lines; a line that ends in \\ goes on in the next, too
Ctrl-C         stops an answer, and keeps what was said; twice at the prompt ends'''


class Repl:
    """A chat between standard input and standard output.

    Answers and what commands are asked to show go to standard output, notices and figures to standard
    error. What fails is a notice where a person can try something else, and raised where input is piped.
    ``budget``: bytes that the figures set the memory against.
    """

    def __init__(self, session: ChatSession, params: SamplingParams, budget: int):
        self.session, self.budget, self._params = session, budget, params
        self._reader, self._sink, self._asked = LineReader(), Sink(None), 0
        self._commands: dict[str, Callable[[str], object]] = {
            "/help": lambda _: self._show(HELP),
            "/clear": self._clear,
            "/undo": self._undo,
            "/retry": self._retry,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/stats": lambda _: self._show(stats_text(session.stats, budget)),
            "/plan": lambda _: self._show(session.llm.plan.table()),
        }

    def run(self) -> None:
        """Until /exit or the end of the input. Raises KeyboardInterrupt at a second Ctrl-C at the prompt."""
        if self._reader.interactive:
            llm = self.session.llm
            notice(
                f"{llm.name}, context of {llm.plan.context} tokens. /help lists the commands, Ctrl-D ends."
            )
        interrupted = False
        with self._sink:
            while True:
                try:
                    said = self._reader.read()
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted = True
                    notice("\n[Ctrl-C again ends the chat]")
                    continue
                except SpecMemoError as error:
                    self._failed(error)
                    continue
                interrupted = False
                if said is None or (said.is_command and said.text in ("/exit", "/quit", "/bye")):
                    break
                self._act(said)

    def _act(self, said: Said) -> None:
        try:
            if said.is_command:
                self._command(said.text)
            elif said.text:
                self._answer(lambda: self.session.send(said.text, self._next_params()))
        except KeyboardInterrupt:  # a second one during an answer: at once, and the cache is lost
            if not self._reader.interactive:
                raise
            notice("\n[interrupted; what was said is kept]")
        except SpecMemoError as error:
            self._failed(error)

    def _failed(self, error: SpecMemoError) -> None:
        if not self._reader.interactive:
            raise error
        notice(f"[{describe(error)}]")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            raise RequestError(f"no command {name}; /help lists them, a space in front makes it a text")
        argument = argument.strip()
        if name in ("/save", "/load") and not argument:
            raise RequestError(f"{name} needs the name of a file: {name} FILE")
        if name not in ("/save", "/load", "/system") and argument:
            raise RequestError(f"{name} takes no argument, found {argument!r}")
        self._commands[name](argument)

    def _answer(self, start: Callable[[], ChatStream]) -> None:
        stream = start()
        if stream.dropped:
            first = " ".join(stream.dropped[0].user.split())
            turns = "turn" if len(stream.dropped) == 1 else f"{len(stream.dropped)} turns"
            notice(f"[the context is full: the oldest {turns} dropped, from {first[:40]!r} on]")
        write = _stripped(self._sink.write_part)
        with stream, first_interrupt(stream.stop):  # the step that runs is kept, and its cache
            for piece in stream:
                write(piece)
        if stream.output is None:
            notice("[stopped before the answer began; the chat is as before]")
            return
        self._asked += 1
        self._sink.write("\n")
        notice(figures(stream.output, self.session.stats, self.budget))

    def _next_params(self) -> SamplingParams:
        """The n-th answer has the n-th seed."""
        if self._params.seed is None:
            return self._params
        return dataclasses.replace(self._params, seed=(self._params.seed + self._asked) % 2**64)

    def _retry(self, _: str) -> None:
        if self._params.is_greedy:
            notice("[the likeliest answer is always the same; --temperature varies it]")
        self._answer(lambda: self.session.retry(self._next_params()))

    def _clear(self, _: str) -> None:
        self.session.clear()
        notice("[all turns forgotten]")

    def _undo(self, _: str) -> None:
        turn = self.session.undo()
        notice(f"[taken back: {' '.join(turn.user.split())[:60]!r}; {len(self.session.turns)} turns left]")

    def _system(self, text: str) -> None:
        if not text:
            self._show(self.session.system or "no system prompt of your own; /system TEXT sets one")
            return
        self.session.system = None if text == '""' else text
        notice("[no system prompt of your own]" if text == '""' else "[the system prompt is set]")

    def _save(self, path: str) -> None:
        self.session.save(path)
        notice(f"[{len(self.session.turns)} turns saved in {path}]")

    def _load(self, path: str) -> None:
        show_loaded(self.session, self.session.load(path), path)

    def _show(self, text: str) -> None:
        self._sink.write(text + "\n")


def show_loaded(session: ChatSession, notices: list[str], path: str) -> None:
    """Say what was loaded, and what is otherwise than saved."""
    for line in (f"{len(session.turns)} turns, {len(session.ids)} tokens from {path}", *notices):
        notice(f"[{line}]")


def figures(output: RequestOutput, stats: ChatStats, budget: int) -> str:
    """The line after an answer."""
    answer, metrics = output.outputs[0], output.metrics
    reason = {"stop": "", "length": " (cut: --max-tokens or the context)", "abort": " (stopped)"}
    return (
        f"[{len(answer.token_ids)} tokens{reason[answer.finish_reason]}, {metrics.tokens_per_second:.1f} "
        f"tokens/s, {metrics.mean_accepted_length:.2f} a step; context {stats.context_used} of "
        f"{stats.context}; memory {stats.memory_bytes / 2**20:.0f} of {budget / 2**20:.0f} MiB]"
    )


def stats_text(stats: ChatStats, budget: int) -> str:
    """What /stats shows."""
    rows = [
        ("turns", f"{stats.turns}" + (f" ({stats.dropped_turns} dropped)" if stats.dropped_turns else "")),
        ("context", f"{stats.context_used} of {stats.context} tokens"),
        ("answers", f"{stats.answers}, {stats.answer_tokens} tokens"),
        ("speed", f"{stats.tokens_per_second:.1f} tokens/s, {stats.mean_accepted_length:.2f} tokens a step"),
        (
            "prefilled",
            f"{stats.prefilled_tokens} of {stats.prompt_tokens} prompt tokens; "
            f"{stats.last_prefilled} for the last answer",
        ),
        ("memory", f"{stats.memory_bytes / 2**20:.1f} of {budget / 2**20:.1f} MiB"),
        ("plan's peak", f"{stats.planned_bytes / 2**20:.1f} MiB"),
    ]
    if stats.full_renders:
        rows.append(
            ("rendered whole", f"{stats.full_renders} prompts: this chat template rewrites what was said")
        )
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


def notice(line: str) -> None:
    """A quiet line on standard error."""
    dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    print(f"\x1b[2m{line}\x1b[0m" if dim else line, file=sys.stderr, flush=True)
