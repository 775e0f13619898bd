"""Compiled programs on disk: a start with nothing new to compile traces and lowers nothing.

A file holds one executable (`jax.experimental.serialize_executable`). Its folder's name is a fingerprint of
all that its programs depend on: the plan, the packages, the device, XLA's settings, and this package's
source. So a file that does not fit is never found, and one that is broken is made anew.

Reading such a file runs what is in it. So the folder must belong to this user and be writable by nobody else;
otherwise nothing is read from it or written to it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pickle
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import specmemo_jax
from specmemo_jax.devices.compiler import processor_hash
from specmemo_jax.errors import CacheWarning
from specmemo_jax.llama.packing import Target
from specmemo_jax.memory.shapes import Shapes

MOST_BYTES = 2**30  # of all executables; the ones that were used longest ago go first
RECENT = "recent.json"  # what the last process used, in its order
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
# Settings that change what is compiled; others do not.
SETTINGS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_threefry_partitionable")


class ExecutableStore:
    """The executables of one plan, for one device. `load` and `save` take a program's name."""

    def __init__(self, root: Path, fingerprint: str, device: Any):
        self.root, self.folder, self._device = root, root / fingerprint, device
        self._used: list[str] = []
        self._lock = threading.Lock()

    @classmethod
    def in_folder(cls, folder: Path | None, target: Target, shapes: Shapes) -> "ExecutableStore | None":
        """In ``folder``/executables; None without a folder or with one that is not safe, where the user has
        turned JAX's compilation cache off, and for a drafter that is not this package's own (its source is
        not known).
        """
        if folder is None or not jax.config.values["jax_enable_compilation_cache"]:
            return None
        drafter = shapes.drafter
        if drafter is not None and type(drafter).__module__.split(".")[0] != "specmemo_jax":
            return None
        root = folder / "executables"
        if not _is_safe(root):
            return None
        return cls(root, fingerprint_of(target, shapes), jax.devices()[0])

    def load(self, name: str) -> jax.stages.Compiled | None:
        """The executable of that name; None where there is none that can be used."""
        path = self._path(name)
        try:
            raw = path.read_bytes()
            digest, content = raw[:32], raw[32:]
            if not _is_own(path) or hashlib.sha256(content).digest() != digest:
                return None
            found = serialize_executable.deserialize_and_load(
                *pickle.loads(content), execution_devices=[self._device]
            )
        except FileNotFoundError:
            return None
        except Exception:  # noqa: BLE001 (whatever is wrong with it, it is compiled anew)
            path.unlink(missing_ok=True)
            return None
        self._note(name)
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def save(self, name: str, program: jax.stages.Compiled) -> None:
        """Keep an executable, where the platform and the disk allow it."""
        try:
            content = pickle.dumps(serialize_executable.serialize(program))
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(self._path(name), hashlib.sha256(content).digest() + content)
            self._drop_oldest()
        except Exception:  # noqa: BLE001 (a cache that cannot be written is no cache)
            return
        self._note(name)

    def recent(self) -> list[str]:
        """Names of what the last process with this plan used, in its order."""
        try:
            found = json.loads((self.folder / RECENT).read_text())
        except (OSError, ValueError):
            return []
        return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []

    def _note(self, name: str) -> None:
        with self._lock:
            if name in self._used:
                return
            self._used.append(name)
            with contextlib.suppress(OSError):
                _write(self.folder / RECENT, json.dumps(self._used).encode())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _drop_oldest(self) -> None:
        files = [(path.stat().st_mtime, path.stat().st_size, path) for path in self.root.rglob("*.bin")]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= MOST_BYTES:
                return
            path.unlink(missing_ok=True)
            total -= size


def fingerprint_of(target: Target, shapes: Shapes) -> str:
    """What the plan's programs depend on, as a folder's name."""
    device = jax.devices()[0]
    told = {
        "shapes": _described(shapes),
        "leaves": [(leaf.shape, str(leaf.dtype)) for leaf in target.leaves],
        "packages": {name: version(name) for name in PACKAGES},
        "source": source_hash(),
        "device": (device.platform, device.device_kind, device.client.platform_version, jax.device_count()),
        "processor": processor_hash(),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "settings": {name: str(jax.config.values.get(name)) for name in SETTINGS},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def source_hash() -> str:
    """Of this package's own modules."""
    root, digest = Path(specmemo_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _described(value: Any) -> Any:
    """A frozen dataclass by its fields, without functions (which are no part of what is compiled)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        told = {name: _described(inner) for name, inner in fields.items() if not isinstance(inner, Callable)}
        return {"": f"{type(value).__module__}.{type(value).__qualname__}", **told}
    if isinstance(value, list | tuple):
        return [_described(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _write(path: Path, content: bytes) -> None:
    """In one move, and readable by nobody else."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _is_safe(root: Path) -> bool:
    """Whether the folder is this user's own and nobody else can write to it; made where there is none."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    if _is_own(root):
        with contextlib.suppress(OSError):
            root.chmod(0o700)
        return True
    warnings.warn(
        f"{root} is another user's, or others can write to it: compiled programs are not kept there; "
        "'chmod go-w', or another cache folder, works",
        CacheWarning,
        stacklevel=3,
    )
    return False


def _is_own(path: Path) -> bool:
    found = path.stat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
