"""``specmemo generate``: prompts from arguments or JSONL, answers as text or JSONL."""

import json
import os
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specmemo_jax.cli.sink import Sink
from specmemo_jax.prompts import PromptRecord, prompts_from_texts, read_prompts

if TYPE_CHECKING:
    from specmemo_jax.outputs import RequestOutput

DEFAULT_MODEL = "smollm2-135m-instruct"


class Dtype(StrEnum):
    """What the weights and the cache are held in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Format(StrEnum):
    """How answers are written."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to answer.")] = None,
    model: Annotated[
        str,
        typer.Option("--model", "-m", metavar="NAME", help="A zoo name, folder, .gguf file or hub id."),
    ] = DEFAULT_MODEL,
    prompts_file: Annotated[
        str | None,
        typer.Option("--prompts", "-p", metavar="FILE", help="JSONL; - is standard input."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Answer only the first N of the file.")
    ] = None,
    drafter: Annotated[
        str, typer.Option(metavar="NAME", help="auto, ngram, or none for plain decoding.")
    ] = "auto",
    tree_nodes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens proposed a step, root included.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Most new tokens an answer.")
    ] = 256,
    max_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts decoded together.")] = 1,
    max_context: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most tokens, prompt and answer; default: what fits."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format.")] = Dtype.auto,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Device memory to stay under, such as 1GiB.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Texts as chat messages, or as they are; default: chat if it can."),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(min=0, metavar="ID", help="Also end at this id; repeatable.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's own end.")] = False,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Instead of standard output."),
    ] = None,
    style: Annotated[
        Format, typer.Option("--format", help="auto: text for arguments on a terminal, else jsonl.")
    ] = Format.auto,
) -> None:
    """Answer prompts given as arguments or in a JSONL file.

    A line of the file is {"prompt": "text"}, {"prompt": [token ids]}, {"messages": [...]}
    or {"turns": [...]} (MT-Bench's question.jsonl as it is: turns are answered in order).
    One JSON object is written an answer, as soon as it is finished.
    """
    records = _records(prompts, prompts_file, output)[:limit]
    with Sink(output) as sink:
        as_text = style is Format.text or (style is Format.auto and bool(prompts) and sink.is_terminal)
        from specmemo_jax.cli.answers import answer, row
        from specmemo_jax.llm import LLM
        from specmemo_jax.outputs import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens, stop_token_ids=tuple(stop_token_id or ()), ignore_eos=ignore_eos
        )
        with (
            LLM(
                model,
                drafter=None if drafter == "none" else drafter,
                tree_nodes=tree_nodes,
                memory_budget=memory_budget,
                dtype=dtype.value,
                max_context=max_context,
                max_batch=max_batch,
            ) as llm,
            _bar(sum(record.num_turns for record in records), sink) as bar,
        ):

            def emit(record: PromptRecord, turn: int, output: "RequestOutput") -> None:
                if as_text:
                    sink.write(_as_text(record, turn, output, headed=len(records) > 1))
                else:
                    sink.write(json.dumps(row(record, turn, output), ensure_ascii=False) + "\n")
                bar.update()

            answer(llm, records, params, emit, chat=chat)


def _records(prompts: list[str] | None, file: str | None, output: str | None) -> list[PromptRecord]:
    if bool(prompts) == (file is not None):
        raise typer.BadParameter(
            "give prompts either as arguments or with --prompts FILE (- is standard input)"
        )
    if prompts:
        return prompts_from_texts(prompts)
    assert file is not None
    if output and os.path.exists(output) and os.path.exists(file) and os.path.samefile(output, file):
        raise typer.BadParameter(f"--output {output} is the prompts file itself; another file works")
    return read_prompts(file)


def _bar(total: int, sink: Sink) -> Any:
    """A progress bar where a person sees it and no answer runs through it."""
    from tqdm import tqdm

    hidden = sink.is_terminal or not sys.stderr.isatty()
    return tqdm(total=total, unit="answer", file=sys.stderr, disable=hidden, dynamic_ncols=True)


def _as_text(record: PromptRecord, turn: int, output: "RequestOutput", *, headed: bool) -> str:
    answer, metrics = output.outputs[0], output.metrics
    head = f"--- {record.id}" + (f", turn {turn}" if record.num_turns > 1 else "") + "\n"
    tail = (
        f"[{len(answer.token_ids)} tokens, {answer.finish_reason}; {metrics.tokens_per_second:.1f} tokens/s, "
        f"{metrics.mean_accepted_length:.2f} tokens a step]"
    )
    return (head if headed or record.num_turns > 1 else "") + answer.text.strip() + "\n" + tail + "\n"
