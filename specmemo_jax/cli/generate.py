"""``specmemo generate``: prompts in, answers out."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from specmemo_jax.cli import options
from specmemo_jax.files.json_lines import row_of
from specmemo_jax.files.prompts import (
    STDIN,
    PromptRecord,
    prompts_from_files,
    prompts_from_texts,
    read_prompts,
)
from specmemo_jax.files.rows import Sink

EXAMPLE = 'specmemo generate "Why is the sky blue?", or: cat question.txt | specmemo generate'
EPILOG = """Examples:

\b
specmemo generate "Why is the sky blue?"
cat question.txt | specmemo generate --temperature 0.7 --seed 1
specmemo generate --prompts question.jsonl --output answers.jsonl --max-batch 4
"""


def generate(
    prompts: options.Prompts = None,
    files: options.Files = None,
    prompts_file: options.PromptsFile = None,
    limit: options.Limit = None,
    chat: options.Chat = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    bad_words: options.BadWords = None,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = 256,
    min_tokens: options.MinTokens = 0,
    stop: options.Stop = None,
    stop_token_ids: options.StopTokenIds = None,
    ignore_eos: options.IgnoreEos = False,
    model: options.Model = options.DEFAULT_MODEL,
    drafter: options.Drafter = "auto",
    tree_nodes: options.TreeNodes = None,
    max_batch: options.MaxBatch = 1,
    max_context: options.MaxContext = None,
    memory_budget: options.MemoryBudget = None,
    dtype: options.NumberFormat = options.Dtype.auto,
    kv_cache_dtype: options.CacheFormat = options.CacheDtype.auto,
    adaptive: options.Adaptive = True,
    output: options.Output = None,
    style: options.Style = options.Format.auto,
    stream: options.Stream = None,
) -> None:
    """Answer one prompt or many.

    Prompts are arguments, text files, a text on standard input, or JSONL. A line of JSONL is
    {"prompt": "text"}, {"prompt": [token ids]}, {"messages": [...]} or {"turns": [...]} (MT-Bench's
    question.jsonl as it is: turns are answered in order). With "params": {"temperature": 0.7, "stop":
    ["END"]} it has its own sampling parameters, named as in SamplingParams. Of a text file and of
    standard input the last line break is left out. As jsonl, one object is written an answer, as soon as
    it is finished.
    """
    if stream:
        _refuse_stream(style, max_batch, output)
    records = gather(prompts, files, prompts_file, output)[:limit]
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "bad_words": bad_words,
        "seed": seed,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": stop,
        "stop_token_ids": stop_token_ids,
        "ignore_eos": ignore_eos,
    }

    from specmemo_jax.cli.sampling import turn_params

    params = turn_params(records, sampling)
    with Sink(output) as sink:
        on_screen = sink.is_terminal and prompts_file is None
        in_words = style is options.Format.text or (style is options.Format.auto and (stream or on_screen))
        if stream is None:
            stream = bool(in_words and sink.is_terminal and max_batch == 1)

        from specmemo_jax.cli.answers import AnsweredTurn, answer, as_text, row
        from specmemo_jax.cli.streaming import stream_answers
        from specmemo_jax.llm import LLM

        with LLM(
            model,
            drafter=drafter,
            tree_nodes=tree_nodes,
            memory_budget=memory_budget,
            dtype=dtype.value,
            kv_cache_dtype=kv_cache_dtype.value,
            adaptive=adaptive,
            max_context=max_context,
            max_batch=max_batch,
        ) as llm:
            if stream:
                stream_answers(llm, records, params, sink, chat=chat)
                return
            with _bar(sum(map(len, params)), sink) as bar:

                def emit(answer: AnsweredTurn) -> None:
                    if in_words:
                        sink.write(as_text(answer, headed=len(records) > 1))
                    else:
                        sink.write(row_of(row(answer)))
                    bar.update()

                answer(llm, records, params, emit, chat=chat)


def _refuse_stream(style: options.Format, max_batch: int, output: str | None) -> None:
    for found, works in (
        (style is options.Format.jsonl and "--format jsonl", "--format text"),
        (max_batch > 1 and f"--max-batch {max_batch}", "--max-batch 1"),
        (output not in (None, "-") and f"--output {output}", "a redirection (>)"),
    ):
        if found:
            raise typer.BadParameter(
                f"--stream shows one answer at a time as text, found {found}; {works} works"
            )


def _bar(total: int, sink: Sink) -> Any:
    """A progress bar where a person sees it and no answer runs through it."""
    from tqdm import tqdm

    hidden = sink.is_terminal or not sys.stderr.isatty()
    return tqdm(total=total, unit="answer", file=sys.stderr, disable=hidden, dynamic_ncols=True)


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
