"""``specmemo calibrate``: measure this device, and how often drafts are accepted."""

import sys
from typing import Annotated

import typer

from specmemo_jax.cli import options

EPILOG = """Examples:

\b
specmemo calibrate
specmemo calibrate --drafter self:10 --prompts question.jsonl
specmemo calibrate --kv-cache-dtype int8 --prompts question.jsonl
"""

PromptsFile = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        "-p",
        metavar="FILE",
        help="JSONL prompts to measure on how often the drafter's tokens are accepted.",
        rich_help_panel=options.PROMPTS,
    ),
]
CacheFormat = Annotated[
    options.CacheDtype,
    typer.Option(
        "--kv-cache-dtype",
        metavar="TYPE",
        help="int8: measure on --prompts what an int8 cache changes, and nothing else.",
        rich_help_panel=options.MODEL,
    ),
]
Timing = Annotated[
    bool,
    typer.Option(
        "--timing/--no-timing",
        help="Measure times; without, only the prompts are run.",
        rich_help_panel=options.OUTPUT,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where what --prompts measured goes; default: the user's cache.",
        rich_help_panel=options.OUTPUT,
    ),
]


def calibrate(
    model: options.Model = options.DEFAULT_MODEL,
    dtype: options.NumberFormat = options.Dtype.auto,
    kv_cache_dtype: CacheFormat = options.CacheDtype.auto,
    drafter: options.Drafter = "auto",
    tree_nodes: options.TreeNodes = None,
    prompts_file: PromptsFile = None,
    limit: options.Limit = None,
    max_tokens: options.MaxTokens = 128,
    timing: Timing = True,
    output: Output = None,
) -> None:
    """Measure what plans are made from, on this device.

    Step times over tree, context and batch, prompt chunks, drafting, and memory bandwidth are kept in the
    cache for this device, model, dtype and versions. With --prompts, so is the chance that a drafted token
    is accepted, by its depth and rank; with --kv-cache-dtype int8 it is how many tokens such a cache leaves
    as they are. Let nothing else run meanwhile.
    """
    of_cache = kv_cache_dtype is options.CacheDtype.int8
    if of_cache and prompts_file is None:
        raise typer.BadParameter("--kv-cache-dtype int8 is measured on prompts; --prompts FILE works")
    if prompts_file is None and (output is not None or not timing):
        raise typer.BadParameter("--output and --no-timing are about --prompts FILE, which was not given")
    if prompts_file is not None and drafter == "none":
        raise typer.BadParameter("--drafter none has nothing to accept; ngram or self:K works with --prompts")

    from pathlib import Path

    from tqdm import tqdm

    from specmemo_jax.devices.compiler import enable_compilation_cache
    from specmemo_jax.measure import run as work
    from specmemo_jax.planning.expected import expected_acceptance

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    enable_compilation_cache()
    if prompts_file is not None:
        work.check_prompts(prompts_file)  # before minutes of measuring
    setup = work.open_setup(model, dtype.value, drafter, tree_nodes)
    if timing and not of_cache:
        calibration = work.calibrate(setup, progress=say)
        path = calibration.save()
        print(f"{'batch':>6}{'nodes':>7}{'slots':>7}{'ms a step':>11}")
        for p in calibration.steps:
            print(f"{p.batch:>6}{p.nodes:>7}{p.capacity:>7}{1e3 * p.seconds:>11.2f}")
        for p in calibration.prefills:
            print(f"prompt chunk of {p.chunk}: {1e3 * p.seconds:.2f} ms")
        for p in calibration.drafts:
            print(f"{p.drafter}, {p.nodes} nodes: {1e3 * p.seconds:.2f} ms a step")
        print(f"bandwidth {calibration.bandwidth / 1e9:.1f} GB/s, {calibration.flops / 1e12:.2f} TFLOP/s")
        print(f"kept in {path}")
    if prompts_file is not None:
        with tqdm(unit="answer", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            if of_cache:
                effect = work.measure_cache(
                    setup, prompts_file, max_tokens=max_tokens, limit=limit, progress=bar.update
                )
                path = work.effect_path(setup) if output is None else Path(output)
                effect.save(path)
                print(f"int8 cache: {effect.source}\nkept in {path}")
                return
            found = work.profile(setup, prompts_file, max_tokens=max_tokens, limit=limit, progress=bar.update)
        path = work.profile_path(setup) if output is None else Path(output)
        found.save(path)
        print(f"{found.source}: a step has a candidate in {found.filled:.0%}")
        assert setup.drafter is not None
        length = expected_acceptance(found, setup.drafter).accepted_length
        print(f"{setup.drafter.num_nodes} nodes: {length:.2f} tokens a step")
        print(f"kept in {path}")
