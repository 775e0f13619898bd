"""``specmemo batch``: a file of requests in, a file of answers out, and a killed run taken up again."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specmemo_jax.cli import options

if TYPE_CHECKING:
    from specmemo_jax.batch import BatchSummary

EPILOG = """Examples:

\b
specmemo batch requests.jsonl answers.jsonl --max-batch auto --memory-budget 2GiB
specmemo batch requests.jsonl answers.jsonl --max-batch 8 --resume
"""
RUN = "Run"

Requests = Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests, one a line.")]
Results = Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Answers, one a line.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with what OUT.jsonl holds of this batch.", rich_help_panel=RUN),
]
RetryErrors = Annotated[
    bool,
    typer.Option(
        "--retry-errors", help="As --resume, and ask again what ended in an error.", rich_help_panel=RUN
    ),
]
Unordered = Annotated[
    bool,
    typer.Option("--unordered", help="Write rows as they end, not in the lines' order.", rich_help_panel=RUN),
]
ServedName = Annotated[
    str | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        help="Another name that requests may give the model, and answers have.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, help="Gives each line without a seed its own, by custom_id.", rich_help_panel=options.SAMPLING
    ),
]


def batch(
    requests: Requests,
    results: Results,
    resume: Resume = False,
    retry_errors: RetryErrors = False,
    unordered: Unordered = False,
    served_model_name: ServedName = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = 1.0,
    seed: Seed = 0,
    max_tokens: options.MaxTokens = 256,
    model: options.Model = options.DEFAULT_MODEL,
    drafter: options.Drafter = "auto",
    tree_nodes: options.TreeNodes = None,
    max_batch: options.BatchRows = "1",
    max_context: options.MaxContext = None,
    memory_budget: options.MemoryBudget = None,
    dtype: options.NumberFormat = options.Dtype.auto,
    kv_cache_dtype: options.CacheFormat = options.CacheDtype.auto,
    adaptive: options.Adaptive = True,
) -> None:
    """Answer a file of requests, row by row into another.

    A line of IN.jsonl is OpenAI's batch line, {"custom_id": ..., "method": "POST", "url":
    "/v1/chat/completions" or "/v1/completions", "body": {...}}, or a body as it is: {"prompt": ...} or
    {"messages": [...]}. Sampling parameters stand in the bodies; the options here are for what they leave
    open. OUT.jsonl has OpenAI's rows, each written when it ends; a line that cannot be answered becomes a
    row with its error. A run that was killed goes on with --resume.
    """
    from specmemo_jax.batch import request_tokens
    from specmemo_jax.checkpoints.open import open_model
    from specmemo_jax.llm import LLM
    from specmemo_jax.serve.params import SamplingParams

    rows = options.row_count("--max-batch", max_batch)
    defaults = SamplingParams(temperature=temperature or 0.0, top_p=top_p, max_tokens=max_tokens)
    lengths: tuple[int, ...] = ()
    if rows != 1:
        lengths = request_tokens(requests, open_model(model, None).tokenizer, defaults)
    with (
        LLM(
            model,
            drafter=drafter,
            tree_nodes=tree_nodes,
            memory_budget=memory_budget,
            dtype=dtype.value,
            kv_cache_dtype=kv_cache_dtype.value,
            adaptive=adaptive,
            max_context=max_context,
            max_batch=rows or "auto",
            request_tokens=lengths,
        ) as llm,
        _bar(requests) as bar,
    ):

        def show(summary: "BatchSummary") -> None:
            if bar.disable:
                return
            bar.update(summary.rows + summary.found_done - bar.n)
            bar.set_postfix_str(_speeds(summary, llm.engine.live_generation_bytes, llm.plan.generation_bytes))

        try:
            summary = llm.run_batch(
                requests,
                results,
                sampling_params=defaults,
                seed=seed,
                resume=resume,
                retry_errors=retry_errors,
                unordered=unordered,
                served_name=served_model_name,
                progress=show,
            )
        except KeyboardInterrupt:
            bar.close()
            print(f"specmemo: {results} holds what was done; --resume goes on", file=sys.stderr)
            raise
    print(_report(summary, results), file=sys.stderr)


def _speeds(summary: "BatchSummary", live: int, planned: int) -> str:
    seconds = max(summary.seconds, 1e-9)
    return (
        f"in {summary.prompt_tokens / seconds:.0f} tok/s, out {summary.new_tokens / seconds:.1f} tok/s, "
        f"{summary.mean_accepted_length:.2f} a step, {live / 2**20:.0f} of {planned / 2**20:.0f} MiB"
    )


def _report(summary: "BatchSummary", results: Path) -> str:
    before = f", {summary.found_done} were there" if summary.found_done else ""
    speed = summary.new_tokens / max(summary.seconds, 1e-9)
    again = "; --retry-errors asks them again" if summary.errors else ""
    return (
        f"{results}: {summary.answered} answered, {summary.errors} errors{before}{again}\n"
        f"{summary.prompt_tokens} tokens in, {summary.new_tokens} out in {summary.seconds:.1f} s "
        f"({speed:.1f} tok/s), {summary.mean_accepted_length:.2f} tokens a step"
    )


def _bar(requests: Path) -> Any:
    """A bar over the lines, where a person sees it."""
    from tqdm import tqdm

    total = None
    if requests.is_file():
        with requests.open("rb") as file:
            total = sum(1 for line in file if line.strip())
    return tqdm(total=total, unit="row", file=sys.stderr, disable=not sys.stderr.isatty(), dynamic_ncols=True)
