"""Where compiled programs are kept between runs."""

import contextlib
import functools
import hashlib
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache

from specmemo_jax.files.cache_dir import cache_dir

# Bytes on either side of every buffer that a GPU's kernels are tried on (XLA's own is 8 MiB).
TUNING_PADDING = "65536"


def compilation_folder(folder: str | Path | None = None) -> Path | None:
    """Where compiled programs are kept: the given folder, JAX's where the user has configured one (None where
    that is no folder of this machine's), else one in the user's cache.

    The default folder's name holds a hash of the processor's features: JAX's key does not,
    and a program compiled for one processor may not run on another.
    """
    if folder is not None:
        return Path(folder)
    if (found := jax.config.values["jax_compilation_cache_dir"]) is not None:
        return None if "://" in str(found) else Path(found)
    return cache_dir() / "xla" / processor_hash()


def enable_compilation_cache(folder: str | Path | None = None) -> None:
    """Let JAX keep compiled programs on disk (`compilation_folder`), unless the user has configured that."""
    if folder is None and jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(compilation_folder(folder)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    compilation_cache.reset_cache()  # JAX looks at the folder once, and may have looked already


def compiler_options(platform: str, tuned: bool = True) -> dict[str, str | bool] | None:
    """XLA options for the engine's programs; measured in docs/performance-log.md.

    On a GPU XLA tries kernels on the device while it compiles, in memory that it borrows; ``tuned=False``
    takes its first guesses instead, and no memory.
    """
    if platform == "cpu":
        return {"xla_cpu_prefer_vector_width": "512"}
    options: dict[str, str | bool] = {"xla_gpu_redzone_padding_bytes": TUNING_PADDING}
    return options if tuned else {**options, "xla_gpu_autotune_level": "0"}


_HIT = "/jax/compilation_cache/cache_hits"
_noting = threading.local()


@contextlib.contextmanager
def noting_cache_hits() -> Iterator[list[str]]:
    """A list that grows by one for each program which this thread takes out of JAX's own cache."""
    _listen()
    before, _noting.hits = getattr(_noting, "hits", None), []
    try:
        yield _noting.hits
    finally:
        _noting.hits = before


@functools.cache
def _listen() -> None:
    def note(event: str, **_: Any) -> None:
        if event == _HIT and (hits := getattr(_noting, "hits", None)) is not None:
            hits.append(event)

    jax.monitoring.register_event_listener(note)


@functools.cache
def processor_hash() -> str:
    """Of the processor's model and features."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})
    identity = "\n".join([platform.machine(), platform.processor(), *features])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
