"""``specmemo convert``: a published draft head as files of this project's own format."""

from pathlib import Path
from typing import Annotated

import typer

from specmemo_jax.cli import options
from specmemo_jax.cli.completion import complete_model

EPILOG = """Examples:

\b
specmemo convert yuhuili/EAGLE-llama2-chat-7B --out eagle-7b --target llama-2-7b-chat
specmemo convert ./medusa-vicuna-7b-v1.3 --out medusa-7b --target vicuna-7b-v1.3 --dtype bfloat16
"""


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder or hub id of an EAGLE or Medusa head.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")],
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="NAME",
            help="The model that it drafts for: a name, folder or config.json; no weights are needed.",
            autocompletion=complete_model,
        ),
    ],
    dtype: Annotated[
        options.Dtype, typer.Option("--dtype", help="What weights are written in; auto: as they are stored.")
    ] = options.Dtype.auto,
) -> None:
    """Write a published draft head as safetensors that say what they are.

    Pickled files are read for their tensors only; nothing in them is run. Every tensor is checked against
    the target. The folder then is a drafter's name: specmemo generate --drafter ./DIR.
    """
    import numpy as np

    from specmemo_jax.checkpoints.checkpoint import all_finite
    from specmemo_jax.draft.head_files import open_head
    from specmemo_jax.errors import ConfigError
    from specmemo_jax.planning.request import named_config
    from specmemo_jax.train.export import head_json, write_files

    folder = Path(out).expanduser()
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds a config.json already; another folder as --out would work")
    config = named_config(target).config
    head = open_head(source, config)
    tensors = head.tensors()
    if dtype is not options.Dtype.auto:
        chosen = np.dtype(dtype.value)
        tensors = {name: array if name == "d2t" else array.astype(chosen) for name, array in tensors.items()}
    overflown = [name for name, array in tensors.items() if name != "d2t" and not all_finite(array)]
    if overflown:
        raise ConfigError(f"{overflown[0]} does not fit {dtype.value}; --dtype bfloat16 or auto would work")
    stored = str(next(array.dtype for name, array in tensors.items() if name != "d2t"))
    content = head_json(head.config, target, config, {"converted_from": source})
    write_files(folder, tensors, content | {"torch_dtype": stored})
    print(folder)
