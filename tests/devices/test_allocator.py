import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from specmemo_jax.devices import allocator, probe
from specmemo_jax.devices.allocator import FRACTION, OLDER_FRACTION, check_allocator, limit_allocator
from specmemo_jax.devices.probe import backend_started, find_gpus, jax_platform
from specmemo_jax.devices.table import DEVICES
from specmemo_jax.errors import CapacityError, ConfigError

GIB, MIB = 2**30, 2**20
T4 = DEVICES["t4"]
ROCM_SMI = """{"card0": {"VRAM Total Memory (B)": "68702699520", "VRAM Total Used Memory (B)": "702699520",
 "Card Series": "AMD INSTINCT MI250 (MCM) OAM AC MBA", "GFX Version": "gfx90a"}, "system": {"Driver": "6"}}"""
CPU: Any = SimpleNamespace(platform="cpu", memory_stats=lambda: None)


def gpu(limit) -> Any:
    stats = None if limit is None else {"bytes_limit": limit}
    return SimpleNamespace(platform="gpu", memory_stats=lambda: stats)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.endswith(("MEM_FRACTION", "VISIBLE_DEVICES")):
            monkeypatch.delenv(name)
    yield
    for name in (FRACTION, "SPECMEMO_MEM_FRACTION"):
        os.environ.pop(name, None)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Put executables of given Python text first, and alone, on PATH."""

    def put(name, code):
        tool = tmp_path / name
        tool.write_text(f"#!{sys.executable} -S\nimport sys\n{code}\n")
        tool.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return put


def nvidia_smi(cards=1, memory=True, unknown=()):
    """nvidia-smi's CSV for ``cards``; it fails on fields that an older driver does not know."""
    return f"""
asked = sys.argv[1].removeprefix("--query-gpu=").split(",")
if set(asked) & set({unknown!r}): sys.exit(2)
for i in range({cards}):
    fields = {{"index": str(i), "uuid": f"GPU-{{i}}abc", "name": "Tesla T4", "compute_cap": "7.5",
              "memory.total": "15360", "memory.free": str(14000 - 5000 * i), "memory.reserved": "251"}}
    if not {memory}: fields |= {{k: "[N/A]" for k in fields if k.startswith("memory")}}
    print(", ".join(fields[a] for a in asked))
"""


@pytest.fixture
def fresh(monkeypatch):
    """A process whose JAX has not started."""
    monkeypatch.setattr(allocator, "backend_started", lambda: False)


def test_no_tool_no_gpu(tools, tmp_path):
    assert find_gpus("cuda") == []
    assert find_gpus("rocm", tmp_path) == []


def test_nvidia_smi(tools, monkeypatch):
    tools("nvidia-smi", nvidia_smi(cards=2))
    first, second = find_gpus("cuda")
    assert (first.name, first.capability, first.total_bytes) == ("Tesla T4", "7.5", T4.memory_bytes)
    assert (first.free_bytes, second.free_bytes) == (14000 * MIB, 9000 * MIB)
    for visible, expected in [
        ("1", [second]),
        ("1,0", [second, first]),
        ("GPU-1", [second]),
        ("", []),
        ("7", []),
    ]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert find_gpus("cuda") == expected


@pytest.mark.parametrize("unknown", [("memory.reserved",), ("memory.reserved", "compute_cap")])
def test_older_nvidia_smi(tools, unknown):
    tools("nvidia-smi", nvidia_smi(unknown=unknown))
    (card,) = find_gpus("cuda")
    assert (card.total_bytes or 0) <= T4.memory_bytes
    assert (card.total_bytes or 0) > 0.98 * T4.memory_bytes
    assert card.capability == (None if "compute_cap" in unknown else "7.5")


def test_nvidia_smi_without_memory_or_answer(tools, monkeypatch):
    tools("nvidia-smi", nvidia_smi(memory=False))
    assert [card.total_bytes for card in find_gpus("cuda")] == [None]
    tools("nvidia-smi", "print('NVIDIA-SMI has failed'); sys.exit(9)")
    assert find_gpus("cuda") == []
    monkeypatch.setattr(probe, "_PATIENCE", 0.2)
    tools("nvidia-smi", "import time; time.sleep(5)")
    assert find_gpus("cuda") == []


def test_rocm_smi_and_sysfs(tools, tmp_path, monkeypatch):
    for index, name in enumerate(["AMD Instinct MI250X", ""]):
        device = tmp_path / f"sys/class/drm/card{index}/device"
        device.mkdir(parents=True)
        (device / "mem_info_vram_total").write_text(f"{64 * GIB}\n")
        (device / "mem_info_vram_used").write_text(f"{GIB}\n")
        (device / "product_name").write_text(name)
    first, second = find_gpus("rocm", tmp_path)
    assert (first.name, first.total_bytes, first.free_bytes) == ("AMD Instinct MI250X", 64 * GIB, 63 * GIB)
    assert second.name == "AMD GPU"
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
    assert find_gpus("rocm", tmp_path) == [second]
    monkeypatch.delenv("ROCR_VISIBLE_DEVICES")
    tools("rocm-smi", f"print('''{ROCM_SMI}''')")
    (card,) = find_gpus("rocm", tmp_path)
    assert (card.total_bytes, card.free_bytes, card.capability) == (68702699520, 68000000000, "gfx90a")
    tools("rocm-smi", "print('not json')")
    assert find_gpus("rocm", tmp_path) == [first, second]


def test_jax_platform_needs_a_plugin_a_card_and_no_refusal(tools, monkeypatch):
    import jax

    tools("nvidia-smi", nvidia_smi())
    monkeypatch.setattr(probe, "_is_installed", lambda package: package == "jax-cuda12-plugin")
    assert jax_platform() == "cpu"  # the tests' JAX_PLATFORMS
    with_setting = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    try:
        for setting, platform in [(None, "cuda"), ("cuda,cpu", "cuda"), ("gpu", "cuda"), ("cpu,cuda", "cpu")]:
            jax.config.update("jax_platforms", setting)
            assert jax_platform() == platform
        monkeypatch.setattr(probe, "_is_installed", lambda package: False)
        assert jax_platform() == "cpu"
    finally:
        jax.config.update("jax_platforms", with_setting)


def test_whether_jax_has_started():
    code = """
import jax
from specmemo_jax.devices.probe import backend_started
assert not backend_started() and not backend_started()
jax.config.update("jax_num_cpu_devices", 3)
assert not backend_started()
assert len(jax.devices()) == 3
assert backend_started() and jax.config.jax_num_cpu_devices == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    import jax

    jax.devices()
    assert backend_started()


@pytest.mark.parametrize("plan", [50 * MIB, 6 * GIB])
def test_the_pool_holds_the_plan_and_little_more(tools, fresh, plan):
    tools("nvidia-smi", nvidia_smi())
    fraction = limit_allocator(plan, T4)
    assert fraction is not None
    assert float(os.environ[FRACTION]) == fraction
    assert OLDER_FRACTION not in os.environ
    pool = fraction * T4.memory_bytes
    assert plan < pool < plan * 1.02 + 33 * MIB
    # A plan made anew before JAX starts replaces it.
    assert (limit_allocator(plan + GIB, T4) or 0) > fraction


def test_the_smallest_of_several_cards_counts(tools, fresh):
    tools("nvidia-smi", nvidia_smi(cards=2))
    with pytest.raises(CapacityError, match=r"needs 12.00 GiB.*has 8.79 GiB free of 14.75 GiB.*would work"):
        limit_allocator(12 * GIB, T4)
    assert FRACTION not in os.environ


def test_without_a_tool_the_specs_memory_is_taken(tools, fresh):
    assert limit_allocator(6 * GIB, T4) == pytest.approx(6 * GIB * (1 + 1 / 64) / T4.memory_bytes, abs=2e-6)


@pytest.mark.parametrize("name", [FRACTION, OLDER_FRACTION])
def test_the_users_fraction_is_checked_and_kept(tools, fresh, monkeypatch, name):
    tools("nvidia-smi", nvidia_smi())
    monkeypatch.setenv(name, "0.5")
    assert limit_allocator(7 * GIB, T4) == 0.5
    with pytest.raises(
        CapacityError, match=r"needs a pool of 8.00 GiB.*0.5 .*7.38 GiB.*=0.551, or none.*637.50 MiB"
    ):
        limit_allocator(8 * GIB, T4)
    assert os.environ[name] == "0.5"
    assert (FRACTION in os.environ) == (name == FRACTION)


def test_fractions_that_are_none(tools, fresh, monkeypatch):
    for text in ("half", "0", "-1", "nan"):
        monkeypatch.setenv(FRACTION, text)
        with pytest.raises(ConfigError, match=r"not a positive number; 0\.5"):
            limit_allocator(GIB, T4)
    monkeypatch.setenv(OLDER_FRACTION, "0.5")
    with pytest.raises(ConfigError, match="both set"):
        limit_allocator(GIB, T4)
    with pytest.raises(ConfigError, match="positive, found 0"):
        limit_allocator(0, T4)


def test_on_cpu_nothing_is_set():
    assert limit_allocator(GIB, DEVICES["cpu"]) is None
    assert check_allocator(GIB) is None
    assert FRACTION not in os.environ


def test_after_the_start_what_was_set_is_checked(monkeypatch):
    cards = [gpu(limit) for limit in (11 * GIB, 9 * GIB)]
    assert check_allocator(9 * GIB, cards) == 9 * GIB
    assert check_allocator(9 * GIB, [CPU, gpu(None)]) is None
    with pytest.raises(
        CapacityError, match=r"needs a pool of 10.00 GiB.*one of 9.00 GiB.*=0.85 .*1.00 GiB would"
    ):
        check_allocator(10 * GIB, cards)
    with pytest.raises(CapacityError, match="a larger device"):
        check_allocator(13 * GIB, cards)
    monkeypatch.setattr(allocator, "backend_started", lambda: True)
    monkeypatch.setattr("jax.local_devices", lambda: cards)
    with pytest.raises(CapacityError, match=r"started with one of 9\.00 GiB"):
        limit_allocator(10 * GIB, T4)
    assert limit_allocator(8 * GIB, T4) is None
    assert FRACTION not in os.environ
