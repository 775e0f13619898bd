"""``specmemo pull`` and ``specmemo list``: what models there are and fetching them."""

from typing import Annotated

import typer


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A zoo name (specmemo list) or a hub id.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of what is there.")] = False,
) -> None:
    """Fetch a model and print where it lies.

    A broken download is resumed, and what is there already is kept.
    """
    from specmemo_jax.weights import pull as fetch

    print(fetch(name, verify=verify))


def list_models() -> None:
    """List the models known by name.

    Weights are here, not pulled yet, or not known to the zoo (config only: for planning).
    """
    from specmemo_jax.weights import zoo_names

    rows = [("name", "parameters", "weights", "licence")]
    for entry in zoo_names():
        state = "config only" if entry.config_only else "here" if entry.is_cached else "not pulled"
        rows.append((entry.name, _count(entry.config.num_params), state, entry.license))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
