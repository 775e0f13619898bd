"""Which GPU is here and what it has free, asked of the driver's own tools: JAX's backend is not started."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

MIB = 2**20
# Seconds for a driver's tool; the first call after boot loads the driver.
_PATIENCE = 20.0
# Of what nvidia-smi calls total the driver keeps 0.7% (H100) to 1.6% (T4) for itself. Newer drivers tell
# (``memory.reserved``); for older ones take a little more than the largest.
_DRIVER_SHARE = 0.02
_PLUGINS = {
    "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin"),
    "rocm": ("jax-rocm7-plugin", "jax-rocm60-plugin"),
}


@dataclasses.dataclass(frozen=True)
class FoundGpu:
    """A GPU as its driver's tool tells of it; ``total_bytes`` is what programs can have of it."""

    name: str
    platform: Literal["cuda", "rocm"]
    total_bytes: int | None  # None where it has no memory of its own
    free_bytes: int | None
    capability: str | None


def backend_started() -> bool:
    """Whether JAX has started its backends; asking does not start them.

    JAX has no public question for it, but promises to refuse a change of ``jax_num_cpu_devices`` afterwards;
    the value is put back at once.
    """
    import jax

    before = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_num_cpu_devices", max(before, 0) + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", before)
    return False


def jax_platform() -> Literal["cpu", "cuda", "rocm"]:
    """What JAX's backend will be by its settings and plugins, as far as that shows before it starts."""
    import jax

    setting = jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]
    asked = [name.strip() for name in setting.split(",") if name.strip()]
    for platform in ("cuda", "rocm"):
        if asked and asked[0] not in (platform, "gpu"):
            continue
        if any(_is_installed(package) for package in _PLUGINS[platform]) and find_gpus(platform):
            return platform
    return "cpu"


def find_gpus(platform: Literal["cuda", "rocm"], root: Path = Path("/")) -> list[FoundGpu]:
    """The GPUs of ``platform`` that this process may use, by nvidia-smi, or by rocm-smi or sysfs.

    ``CUDA_VISIBLE_DEVICES`` (``HIP_VISIBLE_DEVICES``, ``ROCR_VISIBLE_DEVICES``) is obeyed. Two different
    GPUs in one machine may be numbered otherwise by CUDA than by nvidia-smi. ``root``: where ``/sys`` is.
    """
    if platform == "cuda":
        return _visible(_nvidia(), "CUDA_VISIBLE_DEVICES")
    return _visible(_rocm_smi() or _amd_sysfs(root), "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def _nvidia() -> dict[str, FoundGpu]:
    """By index, and by UUID, what nvidia-smi lists."""
    fields = ["index", "uuid", "name", "memory.total", "memory.free", "compute_cap", "memory.reserved"]
    rows = _query(fields) or _query(fields[:-1]) or _query(fields[:-2])
    found: dict[str, FoundGpu] = {}
    for row in rows:
        index, uuid, name, total, free, *rest = row
        mebibytes, spare = _number(total), _number(free)
        kept = _number(rest[1]) if len(rest) > 1 else None
        if mebibytes is not None:
            mebibytes -= kept if kept is not None else mebibytes * _DRIVER_SHARE
        gpu = FoundGpu(
            name,
            "cuda",
            None if mebibytes is None else int(mebibytes * MIB),
            None if mebibytes is None or spare is None else int(min(spare, mebibytes) * MIB),
            rest[0] if rest and _number(rest[0]) is not None else None,
        )
        found[index] = found[uuid] = gpu
    return found


def _query(fields: Sequence[str]) -> list[list[str]]:
    """nvidia-smi's answer; empty where it is missing or an older one does not know a field."""
    text = _run("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == len(fields)]


def _rocm_smi() -> dict[str, FoundGpu]:
    text = _run("rocm-smi", "--showmeminfo", "vram", "--showproductname", "--json")
    with contextlib.suppress(json.JSONDecodeError):
        cards = json.loads(text)
        found = {}
        for card, facts in cards.items():
            if not card.startswith("card") or not isinstance(facts, dict):
                continue
            facts = {key.lower(): str(value) for key, value in facts.items()}
            total, used = (_number(facts.get(f"vram total {kind}memory (b)", "")) for kind in ("", "used "))
            name = facts.get("card series") or facts.get("card model") or "AMD GPU"
            if total is not None:
                free = int(total - (used or 0))
                found[card[4:]] = FoundGpu(name, "rocm", int(total), free, facts.get("gfx version"))
        return found
    return {}


def _amd_sysfs(root: Path) -> dict[str, FoundGpu]:
    """amdgpu's own files (the Linux kernel's documentation of its driver), in the cards' order."""
    found = {}
    cards = sorted(
        (root / "sys/class/drm").glob("card*/device/mem_info_vram_total"), key=lambda p: (len(str(p)), p)
    )
    for index, path in enumerate(cards):
        texts = {}
        for name in ("mem_info_vram_total", "mem_info_vram_used", "product_name"):
            with contextlib.suppress(OSError):
                texts[name] = (path.parent / name).read_text().strip()
        total, used = (_number(texts.get(f"mem_info_vram_{kind}", "")) for kind in ("total", "used"))
        if total is not None:
            name = texts.get("product_name") or "AMD GPU"
            found[str(index)] = FoundGpu(name, "rocm", int(total), int(total - (used or 0)), None)
    return found


def _visible(found: dict[str, FoundGpu], *variables: str) -> list[FoundGpu]:
    """What is left of ``found`` by the first of the environment's ``variables`` that is set, in its order."""
    chosen = next((os.environ[name] for name in variables if name in os.environ), None)
    if chosen is None:
        return [gpu for key, gpu in found.items() if key.isdigit()]
    shown = []
    for wanted in (word.strip() for word in chosen.split(",")):
        # A UUID may be shortened; CUDA stops at the first that is not there.
        match = [
            key
            for key in found
            if key == wanted or (wanted and not wanted.isdigit() and key.startswith(wanted))
        ]
        if not match:
            break
        shown.append(found[match[0]])
    return shown


def _run(*command: str) -> str:
    """What a tool prints; empty where it is missing, fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]", as Jetson answers for memory
        return None


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
