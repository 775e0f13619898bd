"""A trained draft head by name: found, recognised, and checked against the target that it is for."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specmemo_jax.checkpoints.checkpoint import all_finite
from specmemo_jax.checkpoints.hub import fetch_hub_config, fetch_hub_head, is_hub_id
from specmemo_jax.checkpoints.pickled_tensors import list_pickled
from specmemo_jax.checkpoints.safetensors_files import SafetensorsReader, list_safetensors_file
from specmemo_jax.checkpoints.zoo import zoo_folder, zoo_root
from specmemo_jax.draft.head_config import HeadConfig
from specmemo_jax.draft.head_formats import (
    FoundTensor,
    Layout,
    config_names_head,
    head_layout,
    names_of_head,
)
from specmemo_jax.errors import ConfigError, ModelNotFoundError, SpecMemoError, WeightsError
from specmemo_jax.llama.config import LlamaConfig

FILES = ("model.safetensors", "medusa_lm_head.safetensors", "pytorch_model.bin", "medusa_lm_head.pt")
_FLOATS = ("F64", "F32", "F16", "BF16")
_WHOLE = ("I64", "I32", "I16")
_OTHER_HEAD = "a head trained for this target would work"


@dataclasses.dataclass(frozen=True)
class OpenHead:
    """A head whose weights can be read. ``tensors()`` reads them all, under `HeadConfig`'s names, with
    ``d2t`` where it has a draft vocabulary, and checks their values.
    """

    name: str
    config: HeadConfig
    tensors: Callable[[], dict[str, np.ndarray]] = dataclasses.field(repr=False)


def names_head(model: str | Path, *, download: bool = False) -> bool:
    """Whether a zoo name, a folder or a hub id is a draft head rather than a model.

    By its config, by its file's name, or, where a config is like a one-layer Llama's, by its tensors' names.
    False for what is not there. ``download``: of a hub id that is not in the hub's cache the config is
    fetched, and the rest where that does not tell.
    """
    try:
        on_hub = _is_on_hub(model)
        folder = fetch_hub_config(str(model), download=download) if on_hub else _folder(model, download=False)
        if any((folder / file).is_file() for file in FILES if file.startswith("medusa")):
            return True
        raw = _config(folder)
        if config_names_head(raw) or raw.get("num_hidden_layers") != 1:
            return config_names_head(raw)
        if on_hub:
            folder = fetch_hub_head(str(model), download=download)
        return names_of_head(list_tensors(folder))
    except (SpecMemoError, OSError):
        return False


def open_head(model: str | Path, target: LlamaConfig) -> OpenHead:
    """A zoo name, a folder or a hub id as a head for ``target``; reads headers until ``tensors()``.

    Raises ModelNotFoundError, DownloadError; ConfigError for a head of another target or of a kind that is
    not supported; WeightsError for tensors that are missing, unknown, misshapen or, from ``tensors()``, not
    finite, and for a draft vocabulary that contradicts itself or the target's.
    """
    name = str(model)
    folder = _folder(model, download=True)
    raw = _config(folder)
    found = list_tensors(folder)
    try:
        layout = head_layout(raw, found, target)
    except SpecMemoError as error:
        raise type(error)(f"{name} cannot draft for this target: {error}") from error
    if not found:
        ours = raw["specmemo"]
        works = f"{FILES[0]} beside it"
        if ours.get("hub_id"):
            works = f"`specmemo convert {ours['hub_id']} --out DIR --target NAME` and that folder"
        missing = f"{name} is known here by its config only, without weights; {works} would work"
        return OpenHead(name, layout.config, _refuse(missing))
    _check(name, layout, target)
    return OpenHead(name, layout.config, lambda: _read(name, layout, target))


def heads_for(target_name: str) -> tuple[str, ...]:
    """The zoo's heads with weights that were trained for a target of that name."""
    found = []
    for file in sorted(zoo_root().glob(f"*/{FILES[0]}")):
        ours = _config(file.parent).get("specmemo")
        if isinstance(ours, dict) and ours.get("target", {}).get("name") == target_name:
            found.append(file.parent.name)
    return tuple(found)


def list_tensors(folder: Path) -> dict[str, FoundTensor]:
    """Every tensor of a head's file by its name there, from headers alone; empty where there is no file."""
    path = next((folder / file for file in FILES if (folder / file).is_file()), None)
    if path is None:
        return {}
    if path.suffix == ".safetensors":
        return {
            stored.name: FoundTensor(path, stored.name, stored.shape, stored.dtype, SafetensorsReader(stored))
            for stored in list_safetensors_file(path)
        }
    return {
        stored.name: FoundTensor(path, stored.name, stored.shape, stored.dtype, stored.read)
        for stored in list_pickled(path)
    }


def _folder(model: str | Path, *, download: bool) -> Path:
    found = zoo_folder(model) if isinstance(model, str) else None
    if found is not None:
        return found
    path = Path(model).expanduser()
    if str(model) and path.is_dir():
        return path
    if _is_on_hub(model):
        return fetch_hub_head(str(model), download=download)
    raise ModelNotFoundError(
        f"no draft head {str(model)!r} in the zoo or on disk; a folder with config.json and {FILES[0]} "
        "(or the published files), or a hub id org/name, would work"
    )


def _is_on_hub(model: str | Path) -> bool:
    """Whether only the hub can have it."""
    if not isinstance(model, str) or zoo_folder(model) is not None:
        return False
    return is_hub_id(model) and not Path(model).expanduser().exists()


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {file}: {error}; the head's own config.json would work") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds no JSON object; the head's own config.json would work")
    return raw


def _refuse(message: str) -> Callable[[], dict[str, np.ndarray]]:
    def read() -> dict[str, np.ndarray]:
        raise WeightsError(message)

    return read


def _check(name: str, layout: Layout, target: LlamaConfig) -> None:
    """Names, shapes and types against the config, and the config against the target."""
    expected = layout.config.tensor_shapes()
    if layout.config.draft_vocab_size is not None:
        expected = expected | {"d2t": (layout.config.num_draft_tokens,)}
    missing = [wanted for wanted in expected if wanted not in layout.tensors]
    if missing:
        raise WeightsError(
            f"{name}: tensor {missing[0]!r} is missing"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            + f"; all {len(expected)} tensors of a head of kind {layout.config.kind} would work"
        )
    tables = {"d2t": _WHOLE, "t2d": ("BOOL", "U8")}
    for wanted, tensor in layout.tensors.items():
        if tensor.dtype not in tables.get(wanted, _FLOATS):
            raise WeightsError(
                f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}; "
                f"{' or '.join(tables.get(wanted, _FLOATS))} would work"
            )
    sizes = expected | {"t2d": (target.vocab_size,), "d2t": (layout.config.num_draft_tokens,)}
    sizes["embed_tokens.weight"] = (target.vocab_size, target.hidden_size)
    for wanted, tensor in {**layout.tensors, **layout.shared}.items():
        shape = sizes[wanted]
        if tensor.shape != shape:
            turned = " (it is transposed)" if len(shape) == 2 and tensor.shape == shape[::-1] else ""
            raise WeightsError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, a head of kind "
                f"{layout.config.kind} for this target needs {list(shape)}{turned}; {_OTHER_HEAD}"
            )


def _read(name: str, layout: Layout, target: LlamaConfig) -> dict[str, np.ndarray]:
    tensors = {}
    for wanted in layout.config.tensor_shapes():
        tensor = layout.tensors[wanted]
        tensors[wanted] = tensor.read()
        if not all_finite(tensors[wanted]):
            raise WeightsError(
                f"{tensor.file}: tensor {tensor.name!r} holds NaN or Inf; an intact copy would work"
            )
    if "d2t" in layout.tensors:
        d2t = _vocabulary(name, layout.tensors, target.vocab_size)
        if layout.config.draft_vocab_size is not None:
            tensors["d2t"] = d2t
    return tensors


def _vocabulary(name: str, tensors: Mapping[str, FoundTensor], size: int) -> np.ndarray:
    """``d2t``, whose targets must ascend within the target's vocabulary and be those that ``t2d`` marks."""
    d2t = np.asarray(tensors["d2t"].read()).astype(np.int64)
    if np.abs(d2t, dtype=np.float64).max(initial=0) > size:  # before a sum could overflow
        raise WeightsError(
            f"{name}: d2t holds {int(d2t[np.abs(d2t, dtype=np.float64).argmax()])}, "
            f"beyond the target's vocabulary of {size}; {_OTHER_HEAD}"
        )
    ids = d2t + np.arange(len(d2t))
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        raise WeightsError(
            f"{name}: d2t leads to token {int(outside[0])}, the target has 0 to {size - 1}; {_OTHER_HEAD}"
        )
    if (np.diff(ids) <= 0).any():
        at = int((np.diff(ids) <= 0).argmax())
        raise WeightsError(
            f"{name}: d2t leads to token {int(ids[at + 1])} after {int(ids[at])}; "
            "tokens that ascend, each once, would work"
        )
    if "t2d" in tensors:
        marked = np.flatnonzero(tensors["t2d"].read())
        if not np.array_equal(marked, ids):
            differ = np.setxor1d(marked, ids)
            raise WeightsError(
                f"{name}: t2d and d2t disagree about {len(differ)} tokens, {int(differ[0])} the first; "
                "an intact copy would work"
            )
    return d2t
