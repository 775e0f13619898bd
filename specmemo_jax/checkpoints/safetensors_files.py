"""Safetensors checkpoints, one file or sharded: list what is there, read one tensor at a time."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors then uses)
import numpy as np
from safetensors import SafetensorError, safe_open

from specmemo_jax.errors import WeightsError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_BLOCK = 2**24  # bytes that are compared at once
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHER_BYTES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor's place and description, as its file's header gives them."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "F32", "F16", "BF16", "F64"; of a head's tables also "I64", "BOOL", ...
    nbytes: int


@dataclasses.dataclass(frozen=True)
class SafetensorsReader:
    """Reads one tensor when called; the file is mapped only while it is copied out."""

    stored: StoredTensor

    def __call__(self) -> np.ndarray:
        """The tensor's values, float64 as float32. Raises WeightsError."""
        with _open(self.stored.file) as file:
            values = file.get_tensor(self.stored.name)
        return values.astype(np.float32) if self.stored.dtype == "F64" else values


def list_safetensors(folder: Path) -> list[StoredTensor]:
    """Every float tensor of the checkpoint, in file order; headers only.

    The safetensors library checks each header against its file (sizes, bounds, no overlap).
    Raises WeightsError for a missing or truncated shard, a bad index, or a type that is not float.
    """
    single = folder / SINGLE_NAME
    if single.exists():
        return _list_file(single, None)
    weight_map = _read_index(folder / INDEX_NAME)
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    missing = sorted(shard for shard in shards if not (folder / shard).exists())
    if missing:
        raise WeightsError(
            f"{folder}: shard {missing[0]} is missing"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            + f"; all {len(shards)} shards that {INDEX_NAME} names would work"
        )
    return [stored for shard, names in sorted(shards.items()) for stored in _list_file(folder / shard, names)]


def list_safetensors_file(path: Path) -> list[StoredTensor]:
    """Every tensor of one file, of integers and booleans, too; the header only. Raises WeightsError."""
    return _list_file(path, None, _FLOAT_BYTES | _OTHER_BYTES)


def same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, read block by block."""
    if a.shape != b.shape:
        return False
    rows = max(1, _BLOCK * a.shape[0] // max(1, a.nbytes))
    with _open(a.file) as file, _open(b.file) as other_file:
        one, other = file.get_slice(a.name), other_file.get_slice(b.name)
        return all(
            np.array_equal(*(part[i : min(i + rows, a.shape[0])].astype(np.float32) for part in (one, other)))
            for i in range(0, a.shape[0], rows)
        )


def _read_index(path: Path) -> dict[str, str]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} has no weight_map; the index that came with the shards would work")
    for shard in weight_map.values():
        # A plain name, or a stranger's index could point anywhere on this machine.
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise WeightsError(f"{path} names shard {shard!r}; a file name in the same folder would work")
    return weight_map


def _list_file(
    path: Path, wanted: set[str] | None, sizes: Mapping[str, int] = _FLOAT_BYTES
) -> list[StoredTensor]:
    found: list[StoredTensor] = []
    with _open(path) as file:
        for name in file.offset_keys():
            if wanted is not None and name not in wanted:
                continue
            view = file.get_slice(name)
            dtype, shape = view.get_dtype(), tuple(view.get_shape())
            if dtype not in sizes:
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                raise WeightsError(
                    f"{path}: tensor {name!r} is {dtype}, a quantised or integer type that is not supported; "
                    "F32, F16 or BF16 safetensors or a .gguf file would work"
                )
            found.append(StoredTensor(path, name, shape, dtype, math.prod(shape) * sizes[dtype]))
    lost = sorted((wanted or set()) - {stored.name for stored in found})
    if lost:
        raise WeightsError(f"{path}: tensor {lost[0]!r} is not in this shard, although {INDEX_NAME} says so")
    return found


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """``safe_open`` whose every failure is a WeightsError naming the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is truncated or not a safetensors file ({error}); a complete copy would work"
        ) from error
