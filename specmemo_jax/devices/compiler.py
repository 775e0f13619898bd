"""Where compiled programs are kept between runs."""

import hashlib
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from specmemo_jax.files.cache_dir import cache_dir

# Bytes on either side of every buffer that a GPU's kernels are tried on (XLA's own is 8 MiB).
TUNING_PADDING = "65536"


def enable_compilation_cache(folder: str | Path | None = None) -> None:
    """Keep compiled programs on disk, unless JAX was configured by the user already.

    The default folder's name holds a hash of the processor's features: JAX's key does not,
    and a program compiled for one processor may not run on another.
    """
    if folder is None:
        if jax.config.values["jax_compilation_cache_dir"] is not None:
            return
        folder = cache_dir() / "xla" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(folder))
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


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))})
    identity = "\n".join([platform.machine(), platform.processor(), *features])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
