import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from specmemo_jax.devices import table as devices
from specmemo_jax.devices.host import available_memory
from specmemo_jax.devices.probe import FoundGpu
from specmemo_jax.devices.table import (
    DEVICES,
    RESERVE,
    default_dtype,
    default_dtype_of,
    device_memory,
    find_device,
    free_memory,
    has_unified_memory,
    live_device,
    match_name,
)
from specmemo_jax.errors import ConfigError

GIB = 2**30
# Issue 4's table (GB, GB/s, TFLOP/s in half precision).
SHEETS = {
    "titan-rtx": (24, 672, 130), "t4": (16, 320, 65), "rtx-3090": (24, 936, 71), "rtx-4090": (24, 1008, 165),
    "l4": (24, 300, 121), "a10g": (24, 600, 70), "a100-40": (40, 1555, 312), "a100-80": (80, 2039, 312),
    "h100": (80, 3350, 989), "h200": (141, 4800, 989), "mi250-gcd": (64, 1638, 181),
    "mi250x-gcd": (64, 1638, 191), "orin-64": (64, 205, 42),
}  # fmt: skip


def gpu(name, limit=None, capability=None, used=0, version="PJRT C API\ncuda 12090", platform="gpu") -> Any:
    stats = None if limit is None else {"bytes_limit": limit, "bytes_in_use": used}
    return SimpleNamespace(
        platform=platform, device_kind=name, compute_capability=capability, memory_stats=lambda: stats,
        client=SimpleNamespace(platform_version=version),
    )  # fmt: skip


CPU: Any = SimpleNamespace(platform="cpu", device_kind="cpu", memory_stats=lambda: None)


def test_the_table_is_the_data_sheets():
    assert set(DEVICES) == {*SHEETS, "cpu"}
    for slug, (gigabytes, bandwidth, half) in SHEETS.items():
        spec = DEVICES[slug]
        assert spec.slug == slug
        # No driver gives all of what the box says, none keeps a tenth (the two giga differ by 7%).
        assert 0.9 * gigabytes * 10**9 < spec.memory_bytes <= gigabytes * GIB
        assert (spec.bandwidth, spec.flops["float16"]) == (bandwidth * 1e9, half * 1e12)
        assert spec.flops["float32"] < spec.flops["float16"]
        assert set(spec.dtypes) == set(spec.flops)
        assert spec.reserve_bytes == RESERVE[spec.platform] > 0
        assert spec.source
        assert hash(spec) == hash(dataclasses.replace(spec))
    assert [slug for slug, spec in DEVICES.items() if spec.unified_memory] == ["orin-64", "cpu"]


@pytest.mark.parametrize(
    ("slug", "dtype"),
    [("titan-rtx", "float16"), ("t4", "float16"), ("rtx-3090", "bfloat16"), ("orin-64", "bfloat16"),
     ("mi250-gcd", "bfloat16"), ("cpu", "float32")],
)  # fmt: skip
def test_default_dtype_of_a_slug_is_one_it_has(slug, dtype):
    spec = DEVICES[slug]
    assert default_dtype_of(spec) == dtype == spec.dtypes[0]


def test_default_dtype_of_a_device():
    assert default_dtype(CPU) == "float32"
    assert default_dtype(gpu("Tesla T4", capability="7.5")) == "float16"
    assert default_dtype(gpu("NVIDIA A10G", capability="8.6")) == "bfloat16"
    assert default_dtype(gpu("AMD Instinct MI250X", capability="gfx90a")) == "bfloat16"
    assert default_dtype(gpu("anything")) == "bfloat16"


def test_find_device():
    assert find_device("t4") is DEVICES["t4"]
    cpu = find_device("cpu")
    assert (cpu.platform, cpu.reserve_bytes, cpu.unified_memory) == ("cpu", 0, True)
    assert "estimate" in cpu.source
    assert 0.5 < cpu.memory_bytes / available_memory() < 2
    with pytest.raises(ConfigError, match=r"no device 'potato'.*auto.*titan-rtx.*cpu would work"):
        find_device("potato")


def test_auto_is_what_jax_runs_on_here():
    import jax

    jax.devices()
    assert find_device("auto").slug == "cpu"


@pytest.mark.parametrize(
    ("name", "limit", "slug"),
    [
        ("NVIDIA TITAN RTX", 17 * GIB, "titan-rtx"),
        ("NVIDIA A100-SXM4-80GB", 20 * GIB, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 29 * GIB, "a100-40"),
        ("NVIDIA H100 80GB HBM3", 59 * GIB, "h100"),
        ("AMD Instinct MI250X", 48 * GIB, "mi250x-gcd"),
        ("AMD INSTINCT MI250 (MCM) OAM AC MBA", 48 * GIB, "mi250-gcd"),
    ],
)
def test_a_live_gpu_is_matched_by_name_and_sized_by_its_allocator(name, limit, slug):
    row = DEVICES[slug]
    rocm = row.platform == "rocm"
    live = live_device(gpu(name, limit, row.compute_capability, version="rocm 70000" if rocm else "cuda 12"))
    assert (live.slug, live.name, live.platform) == (slug, name, row.platform)
    assert (live.bandwidth, live.flops, live.dtypes) == (row.bandwidth, row.flops, row.dtypes)
    assert live.usable_bytes == limit
    assert row.source in live.source


def test_a_name_without_a_size_takes_the_row_that_holds_it():
    assert match_name("A100", 30 * GIB, "cuda") is DEVICES["a100-40"]
    assert match_name("A100", 60 * GIB, "cuda") is DEVICES["a100-80"]
    assert match_name("A100", None, "cuda") is DEVICES["a100-40"]
    assert match_name("A100", None, "rocm") is None
    assert match_name("NVIDIA H100 PCIe", 60 * GIB, "cuda") is None


def test_an_unknown_gpu_says_what_was_assumed():
    live = live_device(gpu("NVIDIA GeForce GTX 1660", 4 * GIB, "7.5"))
    assert (live.slug, live.usable_bytes, live.dtypes) == (
        "nvidia-geforce-gtx-1660",
        4 * GIB,
        ("float16", "float32"),
    )
    assert "taken as l4's" in live.source
    newer = live_device(gpu("NVIDIA B200", 130 * GIB, "10.0"))
    assert newer.dtypes[0] == "bfloat16"
    assert set(newer.flops) == set(newer.dtypes)
    with pytest.raises(ConfigError, match="'NVIDIA B200' does not say how much memory"):
        live_device(gpu("NVIDIA B200", None, "10.0"))
    with pytest.raises(ConfigError, match="platform 'tpu' is not supported; cpu, cuda or rocm"):
        live_device(gpu("TPU v5e", 1, platform="tpu"))


def test_before_jax_starts_the_drivers_tool_is_asked(monkeypatch):
    cards = [FoundGpu("Tesla T4", "cuda", 15 * GIB, free * GIB, "7.5") for free in (14, 9)]
    monkeypatch.setattr(devices, "backend_started", lambda: False)
    monkeypatch.setattr(devices, "jax_platform", lambda: "cuda")
    monkeypatch.setattr(devices, "find_gpus", lambda platform: cards)
    live = live_device()
    assert (live.slug, live.memory_bytes, live.compute_capability) == ("t4", 9 * GIB, "7.5")
    assert "nvidia-smi" in live.source
    cards[:] = [FoundGpu("Orin (nvgpu)", "cuda", None, None, None)]
    live = live_device()
    assert (live.slug, live.unified_memory) == ("orin-64", True)
    assert live.memory_bytes < 2 * available_memory()
    monkeypatch.setattr(devices, "jax_platform", lambda: "cpu")
    assert live_device().slug == "cpu"


def test_memory_of_a_device():
    assert device_memory(CPU) is None
    assert device_memory(gpu("x")) is None
    card = gpu("x", limit=100, used=30)
    assert (device_memory(card), free_memory(card)) == (100, 70)
    assert free_memory(gpu("x")) is None
    assert (free_memory(CPU) or 0) > 0


@pytest.mark.parametrize(
    ("name", "unified"),
    [("Orin", True), ("NVIDIA GH200 480GB", True), ("Apple M2", True), ("NVIDIA H200", False)],
)  # fmt: skip
def test_unified_memory(name, unified):
    assert has_unified_memory(name) is unified


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_available_memory_is_the_smallest_of_the_limits(tmp_path):
    proc, cgroup = tmp_path / "proc", tmp_path / "sys/fs/cgroup"
    write(proc / "meminfo", "MemTotal:  200 kB\nMemAvailable:  100 kB\n")
    assert available_memory(tmp_path) == 100 * 1024
    # v2: the parent's limit is the nearest, and the file cache can be dropped.
    write(proc / "self/cgroup", "0::/pod/container\n")
    write(cgroup / "pod/memory.max", "50000\n")
    write(cgroup / "pod/memory.current", "40000\n")
    write(cgroup / "pod/memory.stat", "anon 10000\ninactive_file 25000\n")
    write(cgroup / "pod/container/memory.max", "max\n")
    assert available_memory(tmp_path) == 35000
    # v1, whose "no limit" is a huge number; a full group leaves a byte, not a negative.
    write(proc / "self/cgroup", "4:cpu,cpuacct:/a\n3:memory:/a\n")
    write(cgroup / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert available_memory(tmp_path) == 100 * 1024
    write(cgroup / "memory/a/memory.limit_in_bytes", "7000\n")
    write(cgroup / "memory/a/memory.usage_in_bytes", "9000\n")
    assert available_memory(tmp_path) == 1


def test_available_memory_without_linux_files(tmp_path):
    assert available_memory(tmp_path) > GIB // 4
