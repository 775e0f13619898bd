"""Torch's zip files (``.bin``, ``.pt``) of named tensors, read without running anything that they hold.

A pickle is a program. Its opcodes, as `pickletools` takes them apart, drive a machine of our own that knows
numbers, texts, tuples, dicts and the few names of a state dict; any other opcode or name is refused.
(`pickle.Unpickler` allocates by a stranger's numbers and hashes his tuples before ``find_class`` is asked.)
"""

import dataclasses
import math
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from specmemo_jax.errors import WeightsError

_MOST_PICKLE = 4 * 2**20  # bytes of the program itself; a tensor takes some 200
_MOST_ITEMS = 64  # of a tuple
_MOST_NESTED = 4  # tuples in tuples
_MOST_MARKS = 16
_MOST_AXES = 8
_STORAGES: dict[str, tuple[str, Any]] = {
    "DoubleStorage": ("F64", np.float64),
    "FloatStorage": ("F32", np.float32),
    "HalfStorage": ("F16", np.float16),
    "BFloat16Storage": ("BF16", ml_dtypes.bfloat16),
    "LongStorage": ("I64", np.int64),
    "IntStorage": ("I32", np.int32),
    "ShortStorage": ("I16", np.int16),
    "CharStorage": ("I8", np.int8),
    "ByteStorage": ("U8", np.uint8),
    "BoolStorage": ("BOOL", np.uint8),
}
_WORKS = "the tensors alone, saved again by torch.save or as safetensors, would work"


@dataclasses.dataclass(frozen=True)
class PickledTensor:
    """One tensor of a file; ``dtype`` is safetensors' word for its type. ``read()`` gives its values, float64
    as float32; raises WeightsError.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)


def list_pickled(path: Path) -> list[PickledTensor]:
    """Every tensor of a file, in its order; reads the program, no values.

    Raises WeightsError for another format, a broken file, and whatever is not a plain dict of tensors.
    """
    archive = _Archive(path, *_members(path))
    found = _Machine(archive).run()
    if type(found) is not dict:
        raise WeightsError(f"{path} holds no dict of tensors; {_WORKS}")
    tensors = []
    for name, tensor in found.items():
        if not isinstance(tensor, _Tensor):
            raise WeightsError(f"{path}: {name!r:.80} is not a tensor; {_WORKS}")
        word = _STORAGES[tensor.storage.kind][0]
        tensors.append(PickledTensor(path, name, tensor.shape, word, _Read(archive, name, tensor)))
    return tensors


@dataclasses.dataclass(frozen=True)
class _Archive:
    """A zip file's members by their names below its one folder, ``folder/``."""

    path: Path
    folder: str
    sizes: dict[str, int]

    def read(self, member: str) -> bytes:
        try:
            with zipfile.ZipFile(self.path) as file:
                return file.read(self.folder + member)
        except (OSError, zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
            raise WeightsError(f"{self.path} is damaged ({error}); an intact copy would work") from error

    def refuse(self, problem: str) -> WeightsError:
        return WeightsError(f"{self.path}: {problem}; {_WORKS}")


def _members(path: Path) -> tuple[str, dict[str, int]]:
    try:
        with zipfile.ZipFile(path) as file:
            members, size = file.infolist(), path.stat().st_size
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise WeightsError(
            f"{path} is truncated or not torch's zip format ({error}); other pickles are not opened; {_WORKS}"
        ) from error
    programs = [info.filename for info in members if info.filename.count("/") == 1 and _is_program(info)]
    if len(programs) != 1:
        raise WeightsError(
            f"{path} holds {len(programs)} data.pkl, one would be a file of torch.save; {_WORKS}"
        )
    if len({info.filename for info in members}) < len(members):
        raise WeightsError(f"{path} holds a member twice; {_WORKS}")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in members):
        raise WeightsError(f"{path} is compressed or encrypted, which torch.save does not do; {_WORKS}")
    if sum(info.file_size for info in members) > size:
        raise WeightsError(f"{path} says that it holds more than its {size} bytes; an intact copy would work")
    folder = programs[0].removesuffix("data.pkl")
    sizes = {
        info.filename.removeprefix(folder): info.file_size
        for info in members
        if info.filename.startswith(folder)
    }
    if sizes["data.pkl"] > _MOST_PICKLE:
        raise WeightsError(
            f"{path}: data.pkl has {sizes['data.pkl']:,} bytes, {_MOST_PICKLE:,} at most; {_WORKS}"
        )
    found = _Archive(path, folder, sizes)
    if "byteorder" in sizes and found.read("byteorder")[:8].strip() != b"little":
        raise WeightsError(f"{path} has its numbers in big-endian order; {_WORKS}")
    return folder, sizes


def _is_program(info: zipfile.ZipInfo) -> bool:
    return info.filename.endswith("/data.pkl")


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that the program asks for; nothing is imported."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    kind: str
    member: str
    size: int  # elements


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Read:
    archive: _Archive
    name: str
    tensor: _Tensor

    def __call__(self) -> np.ndarray:
        tensor, (word, dtype) = self.tensor, _STORAGES[self.tensor.storage.kind]
        data = self.archive.read(tensor.storage.member)
        flat = np.frombuffer(data, dtype)
        if len(flat) != tensor.storage.size:
            raise self.archive.refuse(f"the bytes of {self.name!r} changed while it was read")
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, bool if word == "BOOL" else dtype)
        pairs = zip(tensor.shape, tensor.strides, strict=True)
        steps = tuple(step * flat.itemsize if size > 1 else 0 for size, step in pairs)
        # In bounds: _tensor checked offset, sizes and strides against the storage.
        view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False)
        if word == "F64":
            return view.astype(np.float32)
        return view != 0 if word == "BOOL" else np.asarray(view, order="C")


class _Tuple(tuple):
    """A tuple that knows how deep it is."""

    level = 1


_MARK = object()


class _Machine:
    """Runs a state dict's program on a stack of plain values."""

    def __init__(self, archive: _Archive):
        self.archive = archive
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.marks = 0

    def run(self) -> Any:
        """What the program leaves."""
        program = self.archive.read("data.pkl")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of strange escapes in texts that are refused anyway
                for opcode, value, _ in pickletools.genops(program):
                    if opcode.name == "STOP":
                        return self.pop()
                    self.step(opcode.name, value)
        except (ValueError, IndexError, TypeError, KeyError, OverflowError) as error:
            if isinstance(error, WeightsError):
                raise
            raise self.archive.refuse(f"its data.pkl cannot be read ({error!r:.120})") from error
        return None

    def step(self, name: str, value: Any) -> None:
        """One opcode."""
        if name in ("PROTO", "FRAME"):
            return
        if name in _VALUES:
            self.stack.append(value)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_TUPLE"):
            self.stack.append({} if name == "EMPTY_DICT" else _Tuple())
        elif name == "MARK":
            self.marks += 1
            if self.marks > _MOST_MARKS:
                raise self.archive.refuse(f"its data.pkl is nested deeper than {_MOST_MARKS}")
            self.stack.append(_MARK)
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            items = self.to_mark() if name == "TUPLE" else [self.pop() for _ in range(int(name[-1]))][::-1]
            self.stack.append(self.tuple_of(items))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else value] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[value])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            names = value.split(" ", 1) if name == "GLOBAL" else [self.pop(), self.pop()][::-1]
            self.stack.append(self.known(*names))
        elif name == "BINPERSID":
            self.stack.append(self.storage(self.pop()))
        elif name == "REDUCE":
            arguments, called = self.pop(), self.pop()
            self.stack.append(self.call(called, arguments))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.to_mark() if name == "SETITEMS" else [self.pop(), self.pop()][::-1]
            self.fill(self.top(), items)
        elif name == "BUILD":  # a state dict's _metadata, which says nothing of tensors
            self.pop()
            if type(self.top()) is not dict:
                raise self.archive.refuse("its data.pkl changes what is not a dict")
        else:
            raise self.archive.refuse(f"its data.pkl has opcode {name}, which no dict of tensors needs")

    def top(self) -> Any:
        """The last value."""
        if not self.stack or self.stack[-1] is _MARK:
            raise self.archive.refuse("its data.pkl takes from an empty stack")
        return self.stack[-1]

    def pop(self) -> Any:
        """The last value, taken away."""
        self.top()
        return self.stack.pop()

    def to_mark(self) -> list[Any]:
        """Values since the last mark, taken away with it."""
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise self.archive.refuse("its data.pkl looks for a mark that is not there")
        self.stack.pop()
        self.marks -= 1
        return items[::-1]

    def tuple_of(self, items: list[Any]) -> _Tuple:
        """A tuple, neither long nor deep."""
        made = _Tuple(items)
        made.level = 1 + max((item.level for item in items if type(item) is _Tuple), default=0)
        if len(made) > _MOST_ITEMS or made.level > _MOST_NESTED:
            raise self.archive.refuse(
                f"its data.pkl has a tuple of {len(made)} items, {made.level} deep; "
                f"{_MOST_ITEMS} and {_MOST_NESTED} are the most that a tensor needs"
            )
        return made

    def fill(self, into: Any, items: list[Any]) -> None:
        """Set a dict's items."""
        if type(into) is not dict or len(items) % 2:
            raise self.archive.refuse("its data.pkl sets items of what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise self.archive.refuse(f"its data.pkl has a key of type {type(key).__name__}, not a name")
            into[key] = value

    def known(self, module: Any, name: Any) -> _Global:
        """One of the names that a state dict has."""
        if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in _NAMES:
            raise WeightsError(
                f"{self.archive.path} asks for {f'{module}.{name}':.80}, which is no part of a tensor "
                f"and would run code; {_WORKS}"
            )
        return _Global(module, name)

    def call(self, called: Any, arguments: Any) -> Any:
        """What one of those names makes of its arguments."""
        if type(called) is not _Global or type(arguments) is not _Tuple:
            raise self.archive.refuse("its data.pkl calls what is not a name")
        if called.name == "OrderedDict" and not arguments:
            return {}
        if called.name == "Size" and len(arguments) == 1 and type(arguments[0]) is _Tuple:
            return arguments[0]
        if called.name == "_rebuild_parameter" and arguments and isinstance(arguments[0], _Tensor):
            return arguments[0]
        if called.name == "_rebuild_tensor_v2" and len(arguments) in (6, 7):
            return self.tensor(*arguments[:4])
        raise self.archive.refuse(f"its data.pkl calls {called.name} with what it does not take")

    def storage(self, found: Any) -> _Storage:
        """Where a tensor's bytes lie."""
        good = type(found) is _Tuple and len(found) == 5 and found[0] == "storage"
        if not good or type(found[1]) is not _Global or found[1].name not in _STORAGES:
            raise self.archive.refuse("its data.pkl names no storage that is known")
        _, kind, key, _, size = found
        member = f"data/{key}" if isinstance(key, str) else ""
        if member not in self.archive.sizes or not _whole([size]):
            raise self.archive.refuse(
                f"its data.pkl names storage {key!r:.40} of size {size!r:.40}, not there"
            )
        wanted, there = size * np.dtype(_STORAGES[kind.name][1]).itemsize, self.archive.sizes[member]
        if wanted != there:
            raise self.archive.refuse(f"storage {key!r:.40} has {there} bytes, its size says {wanted:,}")
        return _Storage(kind.name, member, size)

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
        """A view of a storage, within its bounds."""
        numbers = (
            type(shape) is _Tuple and type(strides) is _Tuple and len(shape) == len(strides) <= _MOST_AXES
        )
        if type(storage) is not _Storage or not numbers or not _whole([offset, *shape, *strides]):
            raise self.archive.refuse("its data.pkl describes a tensor by what is not sizes and strides")
        count = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        beyond = offset > storage.size or (count > 0 and last >= storage.size)
        if beyond or count > storage.size or max(shape, default=1) > max(storage.size, 1):
            # The second: a small storage repeated without end.
            raise self.archive.refuse(
                f"a tensor of shape {list(shape)!s:.80} reaches beyond its storage of {storage.size} numbers"
            )
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _whole(numbers: Iterable[Any]) -> bool:
    return all(type(number) is int and 0 <= number < 2**62 for number in numbers)


_VALUES = frozenset(("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NAMES = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        *(("torch", name) for name in _STORAGES),
    }
)
