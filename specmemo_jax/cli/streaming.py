"""Answers on standard output while they are decoded, one conversation after the other."""

from collections.abc import Callable, Sequence
from contextlib import closing

from specmemo_jax.cli.answers import begin, figures, heading
from specmemo_jax.cli.sampling import TurnParams
from specmemo_jax.files.prompts import PromptRecord
from specmemo_jax.files.rows import Sink
from specmemo_jax.llm import LLM


def stream_answers(
    llm: LLM,
    records: Sequence[PromptRecord],
    params: Sequence[TurnParams],
    sink: Sink,
    *,
    chat: bool | None = None,
) -> None:
    """Write every answer as `answers.as_text` would, in pieces as they come; ``sink`` ends a line cut short.

    Raises RequestError before the first answer starts, as `answers.answer` does.
    """
    for conversation in begin(llm, records, params, chat):
        while not conversation.is_over:
            conversation.ask(llm)
            sink.write_part(heading(conversation.record, conversation.turn, headed=len(records) > 1))
            write = _stripped(sink.write_part)
            with closing(llm.stream(list(conversation.ids), conversation.turn_params)) as stream:
                for piece in stream:
                    write(piece)
            assert stream.output is not None
            sink.write("\n" + figures(stream.output))
            conversation.answered(stream.output, llm.eos_ids)


def _stripped(write: Callable[[str], None]) -> Callable[[str], None]:
    """As ``write``, without the white space that the whole text begins and ends with."""
    held, begun = "", False

    def piecewise(piece: str) -> None:
        nonlocal held, begun
        text = held + piece
        if not begun:
            text = text.lstrip()
        shown = text.rstrip()
        held = text[len(shown) :]
        if shown:
            begun = True
            write(shown)

    return piecewise
