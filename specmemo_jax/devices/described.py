"""Compile for a GPU that is not here: XLA needs its description, not the device.

XLA's CUDA plugin compiles for a ``GpuTargetConfigProto`` (facts of the chip) without a driver, and
`specmemo_jax.devices.compiled` reads the result's memory as for an attached device. Nothing is tuned on
hardware then, so the libraries that XLA calls may choose kernels with another workspace on the real one.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
from jax.experimental import topologies

from specmemo_jax.devices.quiet import quiet_plugins
from specmemo_jax.devices.table import DEVICES, DeviceSpec, find_device
from specmemo_jax.errors import ConfigError

KIB, MIB = 2**10, 2**20
# The cuDNN that jax 0.10 to 0.12 ask for at least.
_CUDNN = (9, 8)


@dataclasses.dataclass(frozen=True)
class CudaFacts:
    """What XLA asks of a CUDA device beside memory, bandwidth and capability."""

    multiprocessors: int
    clock_ghz: float  # boost
    l2_bytes: int


# NVIDIA's data sheets and architecture whitepapers; A10G as the CUDA runtime reports it.
CUDA_FACTS: Mapping[str, CudaFacts] = {
    "titan-rtx": CudaFacts(72, 1.77, 6 * MIB),
    "t4": CudaFacts(40, 1.59, 4 * MIB),
    "rtx-3090": CudaFacts(82, 1.695, 6 * MIB),
    "rtx-4090": CudaFacts(128, 2.52, 72 * MIB),
    "l4": CudaFacts(58, 2.04, 48 * MIB),
    "a10g": CudaFacts(80, 1.71, 6 * MIB),
    "a100-40": CudaFacts(108, 1.41, 40 * MIB),
    "a100-80": CudaFacts(108, 1.41, 40 * MIB),
    "h100": CudaFacts(132, 1.98, 50 * MIB),
    "h200": CudaFacts(132, 1.98, 50 * MIB),
    "orin-64": CudaFacts(16, 1.3, 4 * MIB),
}


@dataclasses.dataclass(frozen=True)
class _Multiprocessor:
    """A streaming multiprocessor of one compute capability."""

    lanes: int  # float32 units
    threads: int
    shared_bytes: int
    shared_optin_bytes: int  # most that one block may ask for


# CUDA C++ programming guide, "Compute Capabilities", technical specifications per compute capability.
_MULTIPROCESSORS: Mapping[str, _Multiprocessor] = {
    "7.5": _Multiprocessor(64, 1024, 64 * KIB, 64 * KIB),
    "8.0": _Multiprocessor(64, 2048, 164 * KIB, 163 * KIB),
    "8.6": _Multiprocessor(128, 1536, 100 * KIB, 99 * KIB),
    "8.7": _Multiprocessor(128, 1536, 164 * KIB, 163 * KIB),
    "8.9": _Multiprocessor(128, 1536, 100 * KIB, 99 * KIB),
    "9.0": _Multiprocessor(128, 2048, 228 * KIB, 227 * KIB),
}


def gpu_target(spec: DeviceSpec) -> str:
    """``spec`` as the text of XLA's ``GpuTargetConfigProto``. Raises ConfigError unless in `CUDA_FACTS`."""
    chip, core = CUDA_FACTS.get(spec.slug), _MULTIPROCESSORS.get(spec.compute_capability or "")
    if chip is None or core is None or spec.compute_capability is None:
        rocm = "; for ROCm the compiler needs ROCm's own libraries and a live device"
        raise ConfigError(
            f"device {spec.slug!r} ({spec.platform}) cannot be described to XLA; {_describable()} would work"
            + (rocm if spec.platform == "rocm" else "")
        )
    major, minor = spec.compute_capability.split(".")
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_core: {core.shared_bytes}
  shared_memory_per_block_optin: {core.shared_optin_bytes}
  threads_per_core_limit: {core.threads}
  core_count: {chip.multiprocessors}
  fpus_per_core: {core.lanes}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(spec.bandwidth)}
  l2_cache_size: {chip.l2_bytes}
  clock_rate_ghz: {chip.clock_ghz}
  device_memory_size: {spec.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
device_description_str: "{spec.name}"
"""


def described_devices(slug: str, count: int = 1) -> list[Any]:
    """``count`` ``jax.Device`` of the table to lower and compile for; nothing can be put on them or run.

    Make a ``jax.sharding.Mesh`` of them and give every ``jax.ShapeDtypeStruct`` a sharding of it, then
    ``jax.jit(f).lower(...).compile()``. The same arguments give the same devices. Works with and without a
    GPU here, whatever JAX_PLATFORMS is; where there is one, call `limit_allocator` before, as loading the
    plugin reads its settings. Raises ConfigError for an unknown slug, one that XLA cannot be told of, or
    where the plugin is missing, with the command that installs it.
    """
    if count < 1:
        raise ConfigError(f"count of described devices must be at least 1, found {count}")
    if slug == "auto":
        raise ConfigError(f"a described device is named; {_describable()} would work")
    return list(_described(slug, count))


@functools.cache
def _described(slug: str, count: int) -> tuple[Any, ...]:
    target = gpu_target(find_device(slug))
    plugin = _plugin_name()

    def topology() -> topologies.TopologyDescription:
        return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")

    with quiet_plugins():
        try:
            described = topology()
        except NotImplementedError:
            # JAX started before, and the plugin left itself out as it saw no GPU.
            _plugin_module(plugin).initialize()
            described = topology()
    return tuple(described.devices)


def missing_plugin() -> str | None:
    """Why nothing can be described here, as one sentence with what would work; None where it can."""
    try:
        _plugin_name()
    except ConfigError as error:
        return str(error)
    return None


def _plugin_name() -> str:
    """``cuda12`` or ``cuda13``, whichever is here whole and fits jaxlib. Raises ConfigError."""
    wanted = jax.__version__
    found = {}
    for name in ("cuda12", "cuda13"):
        for part in ("pjrt", "plugin"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[f"jax-{name}-{part}"] = importlib.metadata.version(f"jax-{name}-{part}")
    for name in ("cuda12", "cuda13"):
        versions = [found.get(f"jax-{name}-{part}", "") for part in ("pjrt", "plugin")]
        if all(version.split(".")[:2] == wanted.split(".")[:2] for version in versions):
            return name
    listed = ", ".join(f"{package} {version}" for package, version in found.items()) or "neither"
    raise ConfigError(
        f"compiling for a GPU that is not here needs jax-cuda12-pjrt and jax-cuda12-plugin of jax {wanted}, "
        f"found {listed}; pip install --no-deps jax-cuda12-pjrt=={wanted} jax-cuda12-plugin=={wanted} "
        "would work"
    )


def _plugin_module(name: str) -> ModuleType:
    """The plugin's module, whose ``initialize()`` is what JAX calls to register it."""
    return importlib.import_module(f"jax_plugins.xla_{name}")


def _describable() -> str:
    return ", ".join(slug for slug in DEVICES if slug in CUDA_FACTS)
