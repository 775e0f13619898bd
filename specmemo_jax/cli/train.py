"""``specmemo train``: a draft head for a target, from the target's own answers."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from specmemo_jax.cli import options
from specmemo_jax.errors import ConfigError

EPILOG = """Examples:

\b
specmemo train --out my-head --synthesize 2000 --minutes 30
specmemo train --method medusa --out my-head --data chats.jsonl --max-steps 2000
"""
DATA, HEAD, RUN = "Data", "Head", "Run"


class Method(StrEnum):
    """Kinds of heads."""

    eagle3 = "eagle3"
    eagle = "eagle"
    medusa = "medusa"


class Loss(StrEnum):
    """What is minimised."""

    kl = "kl"
    lk = "lk"


def train(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the head goes.", rich_help_panel=RUN)],
    target: Annotated[
        str,
        typer.Option(
            "--target",
            "-m",
            metavar="NAME",
            help="A name (specmemo list), folder, .gguf file or hub id.",
            rich_help_panel=HEAD,
        ),
    ] = options.DEFAULT_MODEL,
    method: Annotated[
        Method, typer.Option(metavar="KIND", help="eagle3, eagle, medusa.", rich_help_panel=HEAD)
    ] = (Method.eagle3),
    draft_vocab: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Tokens it can propose, the most frequent ones; 0: all.",
            rich_help_panel=HEAD,
        ),
    ] = 8192,
    own_lm_head: Annotated[
        bool,
        typer.Option(
            "--own-lm-head/--shared-lm-head",
            help="Learn the rows that score its tokens, or use the target's.",
            rich_help_panel=HEAD,
        ),
    ] = False,
    taps: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,N", help="Layers whose inputs it reads; default: as published.", rich_help_panel=HEAD
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSONL of {"messages": [...]} that the target answered, or a .npz of an earlier run; '
            "default: the target asks itself.",
            rich_help_panel=DATA,
        ),
    ] = None,
    synthesize: Annotated[
        int, typer.Option(min=1, metavar="N", help="Conversations to make.", rich_help_panel=DATA)
    ] = 2000,
    answer_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens of a made answer.", rich_help_panel=DATA)
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="X", help="Of sampled answers.", rich_help_panel=DATA)
    ] = 0.7,
    greedy_share: Annotated[
        float, typer.Option(min=0, max=1, metavar="X", help="Of answers, greedy.", rich_help_panel=DATA)
    ] = 0.5,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Texts made together; default: what suits.", rich_help_panel=DATA
        ),
    ] = None,
    length: Annotated[
        int, typer.Option(min=8, metavar="N", help="Tokens of a training row.", rich_help_panel=DATA)
    ] = 512,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, metavar="M", help="Train for so long, compiling aside.", rich_help_panel=RUN),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Train for so many steps; alone, the result is repeatable.",
            rich_help_panel=RUN,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rows a step; default: what suits.", rich_help_panel=RUN),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Tokens ahead: unrolled steps, or Medusa's heads.", rich_help_panel=HEAD
        ),
    ] = 6,
    loss: Annotated[
        Loss,
        typer.Option(metavar="KIND", help="kl, or lk: also the share that is accepted.", rich_help_panel=RUN),
    ] = Loss.kl,
    lr: Annotated[
        float, typer.Option(min=0, metavar="X", help="The highest learning rate.", rich_help_panel=RUN)
    ] = 1e-3,
    dtype: Annotated[
        options.Dtype,
        typer.Option(
            metavar="TYPE", help="Of products; auto: float32 on CPU, else bfloat16.", rich_help_panel=RUN
        ),
    ] = options.Dtype.auto,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of all that is random.", rich_help_panel=RUN)
    ] = 0,
    save_every: Annotated[
        float,
        typer.Option(min=0, metavar="S", help="Seconds between checkpoints.", rich_help_panel=RUN),
    ] = 60.0,
    report_every: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds between reports.", rich_help_panel=RUN)
    ] = 20.0,
) -> None:
    """Train a draft head on the target's own answers.

    DIR gets the head (model.safetensors, config.json), the data that was made, a log, and checkpoints: the
    same command again goes on where it was killed. One question in twenty is held out, and the head is judged
    on those. With --minutes the learning rate follows the clock; with --max-steps alone the weights are the
    same each time. Needs the extra train: pip install specmemo-jax[train].
    """
    if minutes is None and max_steps is None:
        raise typer.BadParameter("nothing ends the training; --minutes M or --max-steps N works")
    try:
        import optax  # noqa: F401
    except ImportError:
        raise ConfigError("training needs optax; pip install 'specmemo-jax[train]' would work") from None
    from specmemo_jax.devices.compiler import enable_compilation_cache
    from specmemo_jax.train.run import Settings, train_head

    enable_compilation_cache()
    settings = Settings(
        method=method.value,
        target=target,
        data=None if data is None else str(data),
        synthesize=synthesize,
        answer_tokens=answer_tokens,
        temperature=temperature,
        greedy_share=greedy_share,
        sample_batch=batch,
        length=length,
        steps=steps,
        loss=loss.value,
        rate=lr,
        draft_vocab=draft_vocab,
        own_lm_head=own_lm_head,
        taps=None if taps is None else tuple(options.count("--taps", tap) for tap in taps.split(",")),
        max_steps=max_steps,
        minutes=minutes,
        rows=rows,
        dtype=dtype.value,
        seed=seed,
        save_every=save_every,
        report_every=report_every,
    )
    report = train_head(settings, out, lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{out}: {report}")
