"""``specmemo pull`` and ``specmemo list``: what models there are and fetching them."""

import dataclasses
import json
from typing import Annotated

import typer

from specmemo_jax.cli.completion import complete_pull


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A zoo name (specmemo list) or a hub id.", autocompletion=complete_pull
        ),
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of what is there.")] = False,
) -> None:
    """Fetch a model and print where it lies.

    A broken download is resumed, and what is there already is kept.
    """
    from specmemo_jax.checkpoints import pull as fetch

    print(fetch(name, verify=verify))


def list_models(
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON array, sizes in bytes, for scripts.")
    ] = False,
) -> None:
    """List the models known by name.

    And the Llamas in the Hugging Face hub's cache. Weights are here, not pulled (generate and pull fetch
    them), not known (config only, for planning), or unusable (incomplete or quantised).
    """
    from specmemo_jax.cli.inventory import inventory
    from specmemo_jax.draft.head_files import heads_for

    models = inventory()
    if as_json:
        print(json.dumps([dataclasses.asdict(model) for model in models], ensure_ascii=False, indent=2))
        return
    rows = [("name", "parameters", "weights", "on disk", "to fetch", "licence")]
    for model in models:
        sizes = _bytes(model.disk_bytes), _bytes(model.download_bytes)
        rows.append((model.name, _count(model.parameters), model.state, *sizes, model.license or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    heads = [f"{head} for {model.name}" for model in models for head in heads_for(model.name)]
    if heads:
        print(f"\ndraft heads (--drafter): {', '.join(heads)}")


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "-"
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
