"""A checked reader of GGUF headers: metadata and where each tensor lies.

The gguf package's own reader trusts the counts and sizes that a file declares; a
truncated or malicious file can make it loop or crash. Here every count is compared
with the bytes that are really there before anything is read. Block sizes, type names
and dequantisation come from the gguf package.
"""

import dataclasses
import itertools
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from specmemo_jax.errors import WeightsError

SUPPORTED_TYPES = {
    GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
}
_MAGIC = b"GGUF"
_MAX_DIMS = 4
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file. ``shape`` is row-major (the reverse of GGUF's own order);
    ``offset`` counts bytes from the start of the file, ``nbytes`` its bytes there."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """Metadata (key to Python value) and tensors (name to place) of a GGUF file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Read and check the header of ``path``; no tensor data is touched.

    Raises WeightsError, naming the file and what is wrong, for anything that is not a
    whole GGUF v2/v3 file with tensors of supported types inside its bounds.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise WeightsError("shorter than a GGUF header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}; a complete GGUF file (version 2 or 3) would work") from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error


class _Cursor:
    """Reads forward through the file, refusing to step past its end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.size = data, 0, len(data)

    def require(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.at:
            raise WeightsError(
                f"truncated: {what} needs {nbytes:,} bytes at {self.at:,}, the file has {self.size:,}"
            )

    def scalar(self, code: str, what: str) -> Any:
        # Little-endian throughout; a big-endian file fails the version check.
        width = struct.calcsize(f"<{code}")
        self.require(width, what)
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += width
        return value

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        # One loop without calls: vocabularies have hundreds of thousands of them.
        data, at, size, found = self.data, self.at, self.size, []
        for _ in range(count):
            end = at + 8
            if end <= size:
                end += int.from_bytes(data[at:end], "little")
            if end > size:
                raise WeightsError(f"truncated: {what} ends at {end:,}, the file has {size:,} bytes")
            found.append(data[at + 8 : end])
            at = end
        self.at = at
        try:
            return [raw.decode("utf-8") for raw in found]
        except UnicodeDecodeError as error:
            raise WeightsError(f"{what} is not UTF-8 ({error.object[:20]!r})") from None

    def count(self, code: str, least_bytes_each: int, what: str) -> int:
        value = self.scalar(code, what)
        self.require(value * least_bytes_each, f"{what} ({value:,})")
        return value


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data)
    if data[:4] != _MAGIC:
        raise WeightsError(f"not a GGUF file (starts with {data[:4]!r})")
    cursor.at = 4
    version = cursor.scalar("I", "version")
    if version not in (2, 3):
        raise WeightsError(f"GGUF version {version} is not supported")
    tensor_count = cursor.count("Q", 24, "tensor count")
    metadata_count = cursor.count("Q", 13, "metadata count")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise WeightsError(f"metadata key {key!r} appears twice")
        metadata[key] = _value(cursor, cursor.scalar("I", f"the type of {key!r}"), key)
    pending = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise WeightsError(f"general.alignment must be a power of two, found {alignment!r}")
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for make in pending:
        tensor = make(data_start, alignment, cursor.size)
        if tensor.name in tensors:
            raise WeightsError(f"tensor {tensor.name!r} appears twice")
        tensors[tensor.name] = tensor
    _refuse_overlap(tensors)
    return GgufHeader(path, metadata, tensors)


def _value(cursor: _Cursor, raw_type: int, key: str) -> Any:
    value_type = _value_type(raw_type, key)
    if value_type is GGUFValueType.STRING:
        return cursor.string(f"the value of {key!r}")
    if value_type is not GGUFValueType.ARRAY:
        return cursor.scalar(_SCALARS[value_type], f"the value of {key!r}")
    item_type = _value_type(cursor.scalar("I", f"the item type of {key!r}"), key)
    if item_type is GGUFValueType.ARRAY:
        raise WeightsError(f"metadata {key!r} is an array of arrays, which is not supported")
    if item_type is GGUFValueType.STRING:
        count = cursor.count("Q", 8, f"the length of {key!r}")
        return cursor.strings(count, f"an item of {key!r}")
    code = _SCALARS[item_type]
    count = cursor.count("Q", struct.calcsize(f"<{code}"), f"the length of {key!r}")
    values = list(struct.unpack_from(f"<{count}{code}", cursor.data, cursor.at))
    cursor.at += count * struct.calcsize(f"<{code}")
    return values


def _value_type(raw: int, key: str) -> GGUFValueType:
    try:
        return GGUFValueType(raw)
    except ValueError:
        raise WeightsError(f"metadata {key!r} has unknown type {raw}") from None


def _tensor_info(cursor: _Cursor) -> Callable[[int, int, int], GgufTensor]:
    """Read one tensor's entry; its place can only be checked once the data's start is known."""
    name = cursor.string("a tensor name")
    num_dims = cursor.scalar("I", f"the shape of {name!r}")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise WeightsError(f"tensor {name!r} declares {num_dims} dimensions")
    shape = tuple(cursor.scalar("Q", f"the shape of {name!r}") for _ in range(num_dims))[::-1]
    raw_type = cursor.scalar("I", f"the type of {name!r}")
    relative = cursor.scalar("Q", f"the offset of {name!r}")

    def place(data_start: int, alignment: int, file_size: int) -> GgufTensor:
        ggml_type = _tensor_type(raw_type, name)
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        if min(shape) < 1 or shape[-1] % block:
            raise WeightsError(f"tensor {name!r} of type {ggml_type.name} cannot have shape {shape}")
        nbytes = math.prod(shape) // block * block_bytes  # Python integers: no overflow
        offset = data_start + relative
        if relative % alignment:
            raise WeightsError(f"tensor {name!r} lies at {relative:,}, not a multiple of {alignment}")
        if offset + nbytes > file_size:
            raise WeightsError(
                f"truncated: tensor {name!r} ends at byte {offset + nbytes:,}, the file has {file_size:,}"
            )
        return GgufTensor(name, shape, ggml_type, offset, nbytes)

    return place


def _tensor_type(raw: int, name: str) -> GGMLQuantizationType:
    works = ", ".join(t.name for t in sorted(SUPPORTED_TYPES))
    try:
        ggml_type = GGMLQuantizationType(raw)
    except ValueError:
        raise WeightsError(f"tensor {name!r} has unknown type {raw} ({works} are supported)") from None
    if ggml_type not in SUPPORTED_TYPES:
        raise WeightsError(f"tensor {name!r} is {ggml_type.name}, which is not supported ({works} are)")
    return ggml_type


def _refuse_overlap(tensors: Mapping[str, GgufTensor]) -> None:
    placed = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for first, second in itertools.pairwise(placed):
        if first.offset + first.nbytes > second.offset:
            raise WeightsError(f"tensors {first.name!r} and {second.name!r} overlap")
