"""Where the prompts come from: arguments, text files, JSONL, or standard input."""

import os
import sys
from collections.abc import Sequence

import typer

from specmemo_jax.files.prompts import (
    STDIN,
    PromptRecord,
    prompts_from_files,
    prompts_from_texts,
    read_prompts,
)

EXAMPLE = 'specmemo generate "Why is the sky blue?", or: cat question.txt | specmemo generate'


def gather(
    texts: Sequence[str] | None, files: Sequence[str] | None, jsonl: str | None, output: str | None
) -> list[PromptRecord]:
    """The prompts of one call, from one kind of source; standard input as a text where there is none.

    Raises typer.BadParameter for sources that contradict each other or the output, RequestError for
    prompts that cannot be read.
    """
    given = [name for name, value in (("arguments", texts), ("--file", files), ("--prompts", jsonl)) if value]
    if len(given) > 1:
        raise typer.BadParameter(
            f"prompts come from one of arguments, --file and --prompts, found {' and '.join(given)}"
        )
    read = [*(files or ()), *([jsonl] if jsonl else ())]
    if [*read, *(texts or ())].count(STDIN) > 1:
        raise typer.BadParameter("standard input (-) can be read only once")
    if same := next((file for file in read if output and _is_same(file, output)), None):
        raise typer.BadParameter(f"--output {output} is the prompts file {same} itself; another file works")
    if jsonl:
        return read_prompts(jsonl)
    if files:
        return prompts_from_files(files)
    if not texts and (sys.stdin is None or sys.stdin.isatty()):
        raise typer.BadParameter(f"no prompt; for example: {EXAMPLE}")
    return prompts_from_texts(texts or [STDIN])


def _is_same(file: str, output: str) -> bool:
    return os.path.exists(file) and os.path.exists(output) and os.path.samefile(file, output)
