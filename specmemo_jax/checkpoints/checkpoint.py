"""One view of a checkpoint on disk, whatever its format: config, then tensors one by one."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from specmemo_jax.checkpoints import gguf_llama
from specmemo_jax.checkpoints.gguf_header import read_gguf_header
from specmemo_jax.checkpoints.safetensors_files import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsReader,
    StoredTensor,
    list_safetensors,
    same_values,
)
from specmemo_jax.errors import CheckpointWarning, ConfigError, WeightsError
from specmemo_jax.llama.config import LlamaConfig

_FINITE_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: its canonical name, where it lies, and how to read it."""

    name: str
    file: Path
    name_in_file: str
    shape: tuple[int, ...]
    stored_as: str  # the file's name of the type: "BF16", "F32", "Q4_1", ...
    nbytes: int  # in the file
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened model folder or file. Names, shapes and types are checked; no weights are read yet."""

    path: Path
    config: LlamaConfig
    entries: tuple[TensorEntry, ...] = dataclasses.field(repr=False)

    @property
    def stored_as(self) -> str:
        """The type that holds most of the file's bytes, e.g. ``"BF16"`` or ``"Q4_1"``."""
        sizes: dict[str, int] = {}
        for entry in self.entries:
            sizes[entry.stored_as] = sizes.get(entry.stored_as, 0) + entry.nbytes
        return max(sizes, key=sizes.__getitem__)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they lie in the file."""
        return sum(entry.nbytes for entry in self.entries)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield every canonical tensor once, in file order, holding one at a time.

        Values have the file's dtype (bfloat16 as ``ml_dtypes.bfloat16``; quantised GGUF types
        and float64 as float32) and the shape that ``config.tensor_shapes()`` tells.
        Raises WeightsError naming the file and the tensor if it cannot be read or holds NaN or Inf.
        """
        for entry in self.entries:
            values = entry.read()
            if not all_finite(values):
                raise WeightsError(
                    f"{entry.file}: tensor {entry.name_in_file!r} holds NaN or Inf; "
                    "an intact copy of the file would work"
                )
            yield entry.name, values
            del values  # a generator's local would keep it alive beside the next one


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder (``model.safetensors``, ``model.safetensors.index.json``, or one ``.gguf``) or a
    ``.gguf`` file and check everything that its headers tell.

    Raises WeightsError for missing, truncated, misshapen, unexpected or quantised tensors and for
    pickled checkpoints; ConfigError for a config that cannot be read or is not supported.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist; a model folder or a .gguf file would work")
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    raise WeightsError(f"{path} is not a checkpoint; a folder with {SINGLE_NAME} or a .gguf file would work")


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / SINGLE_NAME).exists() or (folder / INDEX_NAME).exists():
        config = _folder_config(folder)
        stored = list_safetensors(folder)
        config = _with_own_head(folder, config, stored)
        return Checkpoint(folder, config, _safetensors_entries(folder, config, stored))
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise WeightsError(
            f"{folder} holds {len(ggufs)} GGUF files ({names}); the path of one of them would work"
        )
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        raise WeightsError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code when loaded; "
            "converted to safetensors (save_pretrained with safe_serialization=True) they would work"
        )
    raise WeightsError(f"{folder} has no weights; {SINGLE_NAME}, {INDEX_NAME} or one .gguf file would work")


def _folder_config(folder: Path) -> LlamaConfig:
    file = folder / "config.json"
    if not file.exists():
        raise ConfigError(f"{folder} has no config.json; the model's own one beside its weights would work")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return LlamaConfig.from_json(file)  # says what is wrong with it
    quantised = raw.get("quantization_config") if isinstance(raw, dict) else None
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise WeightsError(
            f"{folder} is quantised ({method}), which is not supported; "
            "the unquantised safetensors or a .gguf file would work"
        )
    return LlamaConfig.from_json(file)


def _with_own_head(folder: Path, config: LlamaConfig, stored: Sequence[StoredTensor]) -> LlamaConfig:
    """The config, untied where it says that head and embedding are one table and the file has two different
    ones: the file's are used, as transformers does.
    """
    tables = {tensor.name.removeprefix("model."): tensor for tensor in stored}
    head, embedding = tables.get("lm_head.weight"), tables.get("embed_tokens.weight")
    if not config.tied_embeddings or head is None or embedding is None or same_values(head, embedding):
        return config
    warnings.warn(
        f"{folder}: the config ties the head to the embedding, but lm_head.weight in the file is another "
        "table; the file's is used",
        CheckpointWarning,
        stacklevel=2,
    )
    return dataclasses.replace(config, tied_embeddings=False)


def _safetensors_entries(
    folder: Path, config: LlamaConfig, found: Sequence[StoredTensor]
) -> tuple[TensorEntry, ...]:
    entries = []
    for stored in found:
        name = stored.name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied_embeddings):
            continue  # written by older transformers; recomputed or shared here
        entries.append(
            TensorEntry(
                name,
                stored.file,
                stored.name,
                stored.shape,
                stored.dtype,
                stored.nbytes,
                SafetensorsReader(stored),
            )
        )
    return _checked(folder, config, entries)


def _open_gguf(path: Path) -> Checkpoint:
    header = read_gguf_header(path)
    config = gguf_llama.gguf_config(header)
    permuted = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    entries = []
    for tensor in header.tensors.values():
        if tensor.name == gguf_llama.ROPE_FACTORS:
            continue  # became config.rope_scaling
        name = gguf_llama.canonical_name(tensor.name) or tensor.name
        heads = next((heads for part, heads in permuted.items() if f".{part}." in name), None)
        reader = gguf_llama.GgufTensorReader(header, tensor, heads)
        entries.append(
            TensorEntry(name, path, tensor.name, tensor.shape, tensor.ggml_type.name, tensor.nbytes, reader)
        )
    return Checkpoint(path, config, _checked(path, config, entries))


def _checked(path: Path, config: LlamaConfig, entries: list[TensorEntry]) -> tuple[TensorEntry, ...]:
    """Names and shapes against the config, before anything is read."""
    if config.num_layers > len(entries):  # before a mad config makes a mad list
        raise WeightsError(
            f"{path}: the config asks for {config.num_layers:,} layers, there are {len(entries)} tensors"
        )
    expected: Mapping[str, tuple[int, ...]] = config.tensor_shapes()
    seen: dict[str, TensorEntry] = {}
    for entry in entries:
        if entry.name in seen:
            raise WeightsError(
                f"{path}: tensor {entry.name!r} appears twice, as {seen[entry.name].name_in_file!r} "
                f"and {entry.name_in_file!r}"
            )
        seen[entry.name] = entry
    missing = [name for name in expected if name not in seen]
    if missing:
        raise WeightsError(f"{path}: {_some(missing)} missing; the config asks for {len(expected)} tensors")
    unexpected = [entry.name_in_file for entry in entries if entry.name not in expected]
    if unexpected:
        raise WeightsError(
            f"{path}: {_some(unexpected)} not expected by the config; a matching config.json would work"
        )
    for entry in entries:
        if entry.shape != expected[entry.name]:
            raise WeightsError(
                f"{entry.file}: tensor {entry.name_in_file!r} has shape {list(entry.shape)}, "
                f"the config asks for {list(expected[entry.name])}"
            )
    return tuple(entries)


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{more} {'are' if len(names) > 1 else 'is'}"


def all_finite(values: np.ndarray) -> bool:
    """No NaN and no Inf; in chunks, so that no mask as large as the tensor is made."""
    flat = values.reshape(-1)
    if values.dtype.itemsize == 2:  # bfloat16, float16: all exponent bits set means NaN or Inf
        bits = flat.view(np.uint16)
        mask = np.uint16(0x7C00 if values.dtype == np.float16 else 0x7F80)
        return not any(
            ((bits[i : i + _FINITE_CHUNK] & mask) == mask).any() for i in range(0, bits.size, _FINITE_CHUNK)
        )
    return all(
        bool(np.isfinite(flat[i : i + _FINITE_CHUNK]).all()) for i in range(0, flat.size, _FINITE_CHUNK)
    )
