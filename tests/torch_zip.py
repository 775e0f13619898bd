"""Torch's zip files written by hand, honest and not: torch itself is not installed."""

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}
BF16 = ml_dtypes.bfloat16


class Program:
    """Opcodes of a pickle, protocol 2, as torch writes them."""

    def __init__(self):
        self.out = io.BytesIO()
        self.out.write(b"\x80\x02")

    def raw(self, data: bytes) -> "Program":
        self.out.write(data)
        return self

    def name(self, module: str, name: str) -> "Program":
        return self.raw(f"c{module}\n{name}\n".encode())

    def text(self, value: str) -> "Program":
        data = value.encode()
        return self.raw(b"X" + struct.pack("<I", len(data)) + data)

    def number(self, value: int) -> "Program":
        if 0 <= value < 2**31:
            return self.raw(b"J" + struct.pack("<i", value))
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return self.raw(b"\x8a" + bytes([len(data)]) + data)

    def numbers(self, values) -> "Program":
        self.raw(b"(")
        for value in values:
            self.number(value)
        return self.raw(b"t")

    def storage(self, kind: str, key: str, size: int) -> "Program":
        self.raw(b"(").text("storage").name("torch", kind).text(key).text("cuda:0").number(size)
        return self.raw(b"tQ")

    def tensor(self, kind: str, key: str, size: int, offset: int, shape, strides) -> "Program":
        self.name("torch._utils", "_rebuild_tensor_v2").raw(b"(").storage(kind, key, size).number(offset)
        self.numbers(shape).numbers(strides).raw(b"\x89").name("collections", "OrderedDict").raw(b")R")
        return self.raw(b"tR")

    def end(self) -> bytes:
        return self.out.getvalue() + b"."


def write_zip(
    path: Path, program: bytes, storages: Mapping[str, bytes], compression=zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/version", "3\n")
    return path


def save_torch(path: Path, tensors: Mapping[str, np.ndarray], parameters: bool = False) -> Path:
    """What ``torch.save(state_dict, path)`` leaves."""
    program, storages = Program(), {}
    program.name("collections", "OrderedDict").raw(b")Rq\x00(")
    for i, (name, array) in enumerate(tensors.items()):
        strides = [step // array.itemsize for step in array.strides]
        program.text(name)
        if parameters:
            program.name("torch._utils", "_rebuild_parameter").raw(b"(")
        program.tensor(STORAGES[array.dtype.name], str(i), array.size, 0, array.shape, strides)
        if parameters:
            program.raw(b"\x88").name("collections", "OrderedDict").raw(b")RtR")
        storages[str(i)] = array.tobytes()
    program.raw(b"u}").text("_metadata").name("collections", "OrderedDict").raw(b")R}").text("version")
    program.raw(b"K\x01sbsb")
    return write_zip(path, program.end(), storages)
