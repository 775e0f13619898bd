"""A plan's proof: every program compiled from shapes alone, and XLA's own figures."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from specmemo_jax.devices.compiled import CompiledCheck, compiled_memory
from specmemo_jax.devices.described import described_devices
from specmemo_jax.devices.table import DeviceSpec
from specmemo_jax.engine.program_cache import ProgramCache, plan_keys
from specmemo_jax.engine.programs import Programs
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.packing import abstract_target
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.mesh.axes import model_mesh


@dataclasses.dataclass(frozen=True)
class CompileTarget:
    """What is compiled for: ``devices`` of a mesh, or None for JAX's default device."""

    name: str
    platform: str
    dtype: str
    devices: tuple[Any, ...] | None = None


def compile_target_for(spec: DeviceSpec, dtype: str, shards: int = 1) -> CompileTarget:
    """Where plans for a device can be compiled: on it if it is the one that JAX runs on, for its description
    if it is a CUDA GPU, else on the CPU in its stead (in bfloat16 for float16, which XLA's CPU backend
    converts to float32 as a whole).

    Raises ConfigError where fewer devices are there than the mesh needs, or the describing plugin is missing.
    """
    live = jax.devices()
    if spec.platform != "cpu" and live[0].platform != "cpu" and live[0].device_kind == spec.name:
        _enough(len(live), shards, spec.name)
        return CompileTarget(spec.name, "gpu", dtype, None if shards == 1 else tuple(live[:shards]))
    if spec.platform == "cuda":
        return CompileTarget(
            f"{spec.name} (described)", "gpu", dtype, tuple(described_devices(spec.slug, shards))
        )
    cpus = jax.devices("cpu")
    _enough(len(cpus), shards, "cpu")
    name = "cpu" if spec.platform == "cpu" else f"cpu, in place of {spec.name}"
    dtype = "bfloat16" if dtype == "float16" else dtype
    devices = None if shards == 1 and live[0].platform == "cpu" else tuple(cpus[:shards])
    return CompileTarget(name, "cpu", dtype, devices)


def prove(
    plan: MemoryPlan, place: CompileTarget, progress: Callable[[str], object] = lambda _: None
) -> MemoryPlan:
    """The plan with its `CompiledCheck`; ``progress`` is told each program's name before it is compiled."""
    programs, extras = programs_for(plan, place), []
    for name, lower in lowerings(programs):
        progress(name)
        extras.append((name, compiled_memory(programs.compile(lower())).extra))
    persistent = sum(b.bytes for b in plan.buffers) - plan.weights_bytes
    most = max(size for _, size in extras)
    return dataclasses.replace(
        plan, proof=CompiledCheck(place.name, place.dtype, tuple(extras), persistent + most)
    )


def programs_for(plan: MemoryPlan, place: CompileTarget) -> Programs:
    """A plan's programs from shapes alone, to be lowered for a place."""
    target = abstract_target(plan.shapes.config, jnp.dtype(place.dtype), place.platform, plan.shapes.shards)
    mesh = None if place.devices is None else model_mesh(place.devices)
    return Programs(target, plan.shapes, mesh)


def lowerings(programs: Programs) -> Iterator[tuple[str, Callable[[], jax.stages.Lowered]]]:
    """Every program of the plan at its largest capacity, by name."""
    cache = ProgramCache(programs)
    for name, key in plan_keys(programs):
        yield name, functools.partial(cache.lowered, *key)


def _enough(found: int, wanted: int, name: str) -> None:
    if found < wanted:
        raise ConfigError(
            f"a mesh of {wanted} devices was asked for, JAX sees {found} of {name}; jax_num_cpu_devices "
            "set before JAX starts, or a described CUDA device, would work"
        )
