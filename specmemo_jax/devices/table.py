"""Devices: what runs here, and a table of those one may plan for without having them."""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

from specmemo_jax.devices.host import available_memory
from specmemo_jax.devices.probe import backend_started, find_gpus, jax_platform
from specmemo_jax.devices.quiet import live_devices
from specmemo_jax.errors import ConfigError

Platform = Literal["cpu", "cuda", "rocm"]

MIB = 2**20
# Device memory that no allocator sees: the driver's context, the loaded kernels of XLA's libraries (cuBLAS,
# cuDNN; rocBLAS and hipBLASLt, whose kernel files are larger) and their handles. Estimates at the upper end
# of what users of CUDA 12 and ROCm 6 report for one process; makers publish none, and drivers differ. On an
# H200 (driver 580, CUDA 13, jax 0.11.2) nvidia-smi showed 632 and 674 MiB beside the pool of two models.
RESERVE: Mapping[Platform, int] = MappingProxyType({"cpu": 0, "cuda": 700 * MIB, "rocm": 1024 * MIB})


@runtime_checkable
class Device(Protocol):
    """What is read of a ``jax.Device``, whose own class has no types."""

    @property
    def platform(self) -> str:
        """``"cpu"``, ``"gpu"``, ..."""
        ...

    def memory_stats(self) -> dict[str, Any] | None:
        """The allocator's figures, where it keeps them."""
        ...


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
    """One device as the planner sees it; where there are several, each is one of these."""

    slug: str
    name: str
    platform: Platform
    memory_bytes: int  # what the driver gives to programs, reserve included
    bandwidth: float  # bytes/s, peak read
    flops: Mapping[str, float] = dataclasses.field(
        hash=False
    )  # dense FLOP/s by dtype name; float32 without TF32
    reserve_bytes: int  # runtime context and libraries, outside the allocator
    dtypes: tuple[str, ...]  # best for weights first
    unified_memory: bool  # the host's memory and the device's are one
    compute_capability: str | None  # "7.5"; an AMD device's architecture ("gfx90a"); None on CPU
    source: str

    @property
    def usable_bytes(self) -> int:
        """Bytes that plans may fill: the memory less the reserve."""
        return self.memory_bytes - self.reserve_bytes


def _cuda(
    slug: str,
    name: str,
    mebibytes: int,
    gigabytes_a_second: float,
    half: float,
    single: float,
    capability: str,
    sheet: str,
    unified: bool = False,
) -> DeviceSpec:
    """A row: memory in MiB, bandwidth in GB/s, ``half`` (fp16, bf16) and ``single`` (float32) in TFLOP/s."""
    flops = {"float16": half * 1e12, "float32": single * 1e12}
    if float(capability) >= 8.0:
        flops = {"bfloat16": half * 1e12} | flops
    return DeviceSpec(
        slug, name, "cuda", mebibytes * MIB, gigabytes_a_second * 1e9, flops,
        RESERVE["cuda"], tuple(flops), unified, capability,
        f"{sheet}; float32 is the CUDA cores' rate; memory is the total that the CUDA runtime reports for it",
    )  # fmt: skip


def _rocm(slug: str, name: str, half: float, single: float, sheet: str) -> DeviceSpec:
    """A row for one GCD of an MI250 (X), half of the module and one device to ROCm; units as in `_cuda`."""
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return DeviceSpec(
        slug, name, "rocm", 65520 * MIB, 1638e9, flops, RESERVE["rocm"],
        tuple(flops), False, "gfx90a",
        f"{sheet}, one GCD of two; float32 is the matrix cores' rate; memory as the kernel driver reports",
    )  # fmt: skip


def _cpu() -> DeviceSpec:
    """The table's row for any CPU: figures that few machines of the last ten years fall short of."""
    # Two channels of DDR4-2400 at a little over half their peak; four AVX2 cores at 2.5 GHz, half used.
    # Without AMX or AVX-512 BF16 bfloat16 runs through float32.
    flops = {"float32": 1.6e11, "bfloat16": 1.6e11}
    return DeviceSpec(
        "cpu", "CPU", "cpu", available_memory(), 20e9, flops, RESERVE["cpu"],
        tuple(flops), True, None,
        "memory: available on this machine; bandwidth and rates: an estimate (dual-channel DDR4, four cores)",
    )  # fmt: skip


_GPUS = (
    _cuda("titan-rtx", "NVIDIA TITAN RTX", 24217, 672, 130, 16.3, "7.5", "NVIDIA Titan RTX specifications"),
    _cuda("t4", "Tesla T4", 15109, 320, 65, 8.1, "7.5", "NVIDIA T4 data sheet"),
    _cuda("rtx-3090", "NVIDIA GeForce RTX 3090", 24259, 936, 71, 35.6, "8.6", "NVIDIA GA102 whitepaper"),
    _cuda("rtx-4090", "NVIDIA GeForce RTX 4090", 24217, 1008, 165, 82.6, "8.9", "NVIDIA Ada whitepaper"),
    _cuda("l4", "NVIDIA L4", 22478, 300, 121, 30.3, "8.9", "NVIDIA L4 data sheet"),
    _cuda("a10g", "NVIDIA A10G", 22515, 600, 70, 31.5, "8.6", "NVIDIA A10G figures published with AWS G5"),
    _cuda("a100-40", "NVIDIA A100-SXM4-40GB", 40326, 1555, 312, 19.5, "8.0", "NVIDIA A100 data sheet"),
    _cuda("a100-80", "NVIDIA A100-SXM4-80GB", 81157, 2039, 312, 19.5, "8.0", "NVIDIA A100 80GB data sheet"),
    _cuda("h100", "NVIDIA H100 80GB HBM3", 81007, 3350, 989, 66.9, "9.0", "NVIDIA H100 SXM data sheet"),
    _cuda("h200", "NVIDIA H200", 143156, 4800, 989, 66.9, "9.0", "NVIDIA H200 SXM data sheet"),
    _rocm("mi250-gcd", "AMD Instinct MI250", 181, 45.3, "AMD MI250 data sheet"),
    _rocm("mi250x-gcd", "AMD Instinct MI250X", 191, 47.9, "AMD MI250X data sheet"),
    _cuda("orin-64", "Orin", 62841, 205, 42, 5.3, "8.7", "NVIDIA Jetson AGX Orin data sheet", unified=True),
)
DEVICES: Mapping[str, DeviceSpec] = MappingProxyType({spec.slug: spec for spec in (*_GPUS, _cpu())})


def find_device(slug: str) -> DeviceSpec:
    """The device of that ``slug``; ``"auto"`` is the one JAX runs on. Raises ConfigError naming the slugs."""
    if slug == "auto":
        return live_device()
    if slug not in DEVICES:
        raise ConfigError(
            f"no device {slug!r} is known; auto (what runs here), {', '.join(DEVICES)} would work"
        )
    spec = DEVICES[slug]
    return dataclasses.replace(spec, memory_bytes=available_memory()) if spec.platform == "cpu" else spec


def live_device(device: Device | None = None) -> DeviceSpec:
    """What ``device`` is; None: what JAX runs on, or will (it is not started, so that a limit can be set).

    Name, capability and memory are its own; bandwidth and rates the table's where the name is there, else
    those of the slowest row of its platform, and ``source`` says so. ``memory_bytes`` is what this process
    can have: on CPU what the machine has available; on a GPU, before JAX starts, what the driver says is
    free; after, the allocator's limit and the reserve. Raises ConfigError for a platform that is neither CPU,
    CUDA nor ROCm, and for a GPU of unknown name and size.
    """
    if device is None and not backend_started():
        platform = jax_platform()
        if platform == "cpu":
            return find_device("cpu")
        # Where GPUs differ every one must hold its part: the smallest counts.
        gpu = min(find_gpus(platform), key=lambda gpu: gpu.free_bytes or 0)
        tool = "nvidia-smi" if platform == "cuda" else "amdgpu"
        return _live_gpu(gpu.name, platform, gpu.capability, gpu.total_bytes, gpu.free_bytes, tool)
    if device is None:
        first: Device = live_devices()[0]
    else:
        first = device
    if first.platform == "cpu":
        return find_device("cpu")
    platform, capability = _gpu_platform(first)
    limit = device_memory(first)
    memory = None if limit is None else limit + RESERVE[platform]
    return _live_gpu(getattr(first, "device_kind", platform), platform, capability, memory, memory, "JAX")


def _live_gpu(
    name: str, platform: Platform, capability: str | None, size: int | None, memory: int | None, teller: str
) -> DeviceSpec:
    """A live GPU: ``size`` bytes tell equal names apart, ``memory`` is what can be had; None: unknown."""
    known = match_name(name, size, platform)
    unified = known.unified_memory if known else has_unified_memory(name)
    if memory is None and unified:
        memory = available_memory()
    if memory is None and known is None:
        raise ConfigError(
            f"device {name!r} does not say how much memory it has and is not in the table; "
            f"one of {', '.join(DEVICES)} and a memory budget would work"
        )
    peers = [s for s in _GPUS if s.platform == platform and s.unified_memory in (unified, False)]
    like = known or min(peers, key=lambda s: s.bandwidth)
    if capability is None:
        capability = like.compute_capability if known else None
    half = _default_dtype(platform, capability)
    dtypes = tuple(dict.fromkeys((half, "float16", "float32")))
    told = f"name, memory, capability: {teller}; bandwidth and rates: "
    return DeviceSpec(
        slug=known.slug if known else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        name=name,
        platform=platform,
        memory_bytes=like.memory_bytes if memory is None else memory,
        bandwidth=like.bandwidth,
        flops={d: like.flops.get(d, like.flops["float16"]) for d in dtypes},
        reserve_bytes=RESERVE[platform],
        dtypes=dtypes,
        unified_memory=unified,
        compute_capability=capability,
        source=told + (f"{known.slug}, {known.source}" if known else f"unknown, taken as {like.slug}'s"),
    )


def match_name(name: str, memory: int | None, platform: Platform) -> DeviceSpec | None:
    """The table's row for a device's own ``name``; of two (A100 40 and 80 GB) the one of that size.

    The size is the name's own or, where it has none, the smallest that holds ``memory`` bytes (any share of
    the device's memory that separates its sizes).
    """
    key, size = _key(name)
    found = [spec for spec in _GPUS if spec.platform == platform and _key(spec.name)[0] == key]
    named = [spec for spec in found if size is not None and _key(spec.name)[1] == size]
    holding = [spec for spec in found if spec.memory_bytes >= (memory or 0)]
    return min(named or holding or found, key=lambda spec: spec.memory_bytes, default=None)


def _key(name: str) -> tuple[str, str | None]:
    """A device's name without maker, brand and form, and its size: ``NVIDIA A100-SXM4-80GB`` is a100 80gb."""
    words = re.split(r"[\s\-/_()]+", name.lower())
    noise = r"|nvidia|amd|instinct|geforce|tesla|jetson|agx|nvgpu|sxm\d?|hbm\d\w?|mcm|oam|ac|mba|\d+gb"
    size = next((word for word in words if re.fullmatch(r"\d+gb", word)), None)
    return " ".join(word for word in words if not re.fullmatch(noise, word)), size


def has_unified_memory(name: str) -> bool:
    """Whether a GPU of that ``name`` shares the host's memory (Jetson, Grace Hopper, Apple, integrated)."""
    return bool(
        re.search(r"orin|xavier|tegra|thor|gh200|gb10|gb200|apple|mi300a|radeon graphics", name.lower())
    )


def _gpu_platform(device: Device) -> tuple[Platform, str | None]:
    """``cuda`` or ``rocm``, and the capability; JAX calls both ``gpu`` and tells them apart in the client."""
    if device.platform not in ("gpu", "cuda", "rocm"):
        raise ConfigError(
            f"device platform {device.platform!r} is not supported; cpu, cuda or rocm would work"
        )
    capability = getattr(device, "compute_capability", None)
    version = str(getattr(getattr(device, "client", None), "platform_version", ""))
    is_rocm = device.platform == "rocm" or "rocm" in version.lower() or str(capability).startswith("gfx")
    return ("rocm" if is_rocm else "cuda"), None if capability is None else str(capability)


def default_dtype(device: Device) -> str:
    """float32 on CPU (exact, and XLA's fastest path there), bfloat16 on GPUs that have it, else float16."""
    return _default_dtype(device.platform, getattr(device, "compute_capability", None))


def default_dtype_of(spec: DeviceSpec) -> str:
    """`default_dtype` for a device that need not be here."""
    return _default_dtype(spec.platform, spec.compute_capability)


def _default_dtype(platform: str, capability: object) -> str:
    if platform == "cpu":
        return "float32"
    try:
        has_bf16 = capability is None or float(str(capability)) >= 8.0
    except ValueError:  # ROCm answers with an architecture name; all that JAX supports have bfloat16
        has_bf16 = True
    return "bfloat16" if has_bf16 else "float16"


def device_memory(device: Device) -> int | None:
    """Bytes the allocator may use on ``device``; None where it does not say (CPU)."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return None if not stats else stats.get("bytes_limit")


def free_memory(device: Device) -> int | None:
    """Bytes still free on ``device``: of the allocator's limit, on CPU of the machine; None where unknown."""
    if device.platform == "cpu":
        return available_memory()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
