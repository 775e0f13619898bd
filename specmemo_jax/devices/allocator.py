"""The GPU allocator's limit, set from the plan: what a plan promises is all that JAX can take.

JAX's pool on a GPU is a fraction of the device's memory, read from the environment when its backend starts
(JAX documentation, "GPU memory allocation"). On CPU there is no pool, and all of this does nothing.
"""

import math
import os
from collections.abc import Sequence

from specmemo_jax.devices.probe import FoundGpu, backend_started, find_gpus
from specmemo_jax.devices.table import Device, DeviceSpec, device_memory
from specmemo_jax.errors import CapacityError, ConfigError
from specmemo_jax.files.byte_size import format_bytes

FRACTION = "XLA_CLIENT_MEM_FRACTION"
OLDER_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# Beside the fraction, what this package set it to: another value is the user's.
_OURS = "SPECMEMO_MEM_FRACTION"
MIB = 2**20
# The pool beyond the plan: the allocator rounds each buffer up and cannot move one, and the driver's total
# differs a little from its tool's.
_SLACK_SHARE, _SLACK_LEAST = 1 / 64, 32 * MIB
# JAX's own default, where nobody set a fraction.
_DEFAULT_FRACTION = 0.75


def limit_allocator(plan_bytes: int, device: DeviceSpec) -> float | None:
    """Make JAX's pool on every GPU hold ``plan_bytes`` (peak less the runtime's reserve) and little more.

    Before the backend starts, sets ``XLA_CLIENT_MEM_FRACTION`` and returns it; a fraction that the user set
    is checked and left. After the start nothing can be set, and what was is checked. Call `check_allocator`
    once the backend runs. Returns None on CPU and where the pool is there already. Raises CapacityError with
    the numbers and what would work, ConfigError for a fraction that is no number.
    """
    if plan_bytes < 1:
        raise ConfigError(f"a plan's bytes must be positive, found {plan_bytes}")
    if device.platform == "cpu":
        return None
    if backend_started():
        check_allocator(plan_bytes)
        return None
    found = [gpu for gpu in find_gpus(device.platform) if gpu.total_bytes]
    total, free = _smallest(found, device)
    asked = _set_fraction()
    ours = FRACTION in os.environ and os.environ[FRACTION] == os.environ.get(_OURS)
    if asked is not None and not ours:
        _check_fraction(asked, plan_bytes, total)
        return asked
    needed = plan_bytes + device.reserve_bytes
    if needed > free:
        raise CapacityError(
            f"the plan needs {format_bytes(plan_bytes)} and the {device.platform} runtime "
            f"{format_bytes(device.reserve_bytes)}; {device.name} has "
            f"{format_bytes(free)} free of {format_bytes(total)}; "
            f"a memory budget of {format_bytes(free)} or less, or ending what else runs there, would work"
        )
    fraction = min(_fraction(plan_bytes, total), free / total)
    os.environ[FRACTION] = os.environ[_OURS] = f"{fraction:.6f}"
    return fraction


def check_allocator(plan_bytes: int, devices: Sequence[Device] | None = None) -> int | None:
    """The smallest pool of ``devices`` in bytes, which holds ``plan_bytes``.

    ``devices``: None are JAX's local ones, whose backend is started. Returns None where there is no pool
    (CPU, the ``platform`` allocator).

    Raises CapacityError where it is too small: JAX started before the limit was set, or another one was set.
    """
    if devices is None:
        import jax

        devices = jax.local_devices()
    pools = [pool for pool in map(device_memory, devices) if pool is not None]
    if not pools:
        return None
    smallest = min(pools)
    if smallest < plan_bytes:
        fraction = _set_fraction() or _DEFAULT_FRACTION
        wanted = _fraction(plan_bytes, round(smallest / fraction))
        remedy = (
            f"{FRACTION}={wanted:.2f} in the environment (about), or making the plan before anything uses JAX"
            if wanted <= 1
            else "a larger device"
        )
        raise CapacityError(
            f"the plan needs a pool of {format_bytes(plan_bytes)}, and JAX started with one of "
            f"{format_bytes(smallest)}, which cannot change any more; "
            f"{remedy}, or a memory budget smaller by "
            f"{format_bytes(plan_bytes - smallest)} would work"
        )
    return smallest


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA could not allocate."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _smallest(found: Sequence[FoundGpu], device: DeviceSpec) -> tuple[int, int]:
    """Total and free bytes that every GPU here has at least; the device's own figures where no tool tells."""
    totals = [gpu.total_bytes for gpu in found if gpu.total_bytes is not None]
    frees = [gpu.free_bytes for gpu in found if gpu.free_bytes is not None]
    total = min(totals, default=device.memory_bytes)
    return total, min([*frees, total])


def _fraction(plan_bytes: int, total: int) -> float:
    """The share of ``total`` that holds the plan and the allocator's slack, rounded up to the millionth."""
    pool = plan_bytes + max(_SLACK_LEAST, plan_bytes * _SLACK_SHARE)
    return math.ceil(pool / total * 1e6) / 1e6


def _set_fraction() -> float | None:
    """The fraction in the environment; None where none is set."""
    both = [name for name in (FRACTION, OLDER_FRACTION) if os.environ.get(name)]
    if not both:
        return None
    if len(both) == 2:
        raise ConfigError(f"{FRACTION} and {OLDER_FRACTION} are both set; one of them would work")
    text = os.environ[both[0]]
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not fraction > 0:
        raise ConfigError(f"{both[0]}={text!r} is not a positive number; 0.5 (or none) would work")
    return fraction


def _check_fraction(fraction: float, plan_bytes: int, total: int) -> None:
    pool = int(fraction * total)
    if pool < plan_bytes:
        wanted = _fraction(plan_bytes, total)
        raise CapacityError(
            f"the plan needs a pool of {format_bytes(plan_bytes)}, and the fraction {fraction:g} in the "
            f"environment makes one of {format_bytes(pool)} of the device's {format_bytes(total)}; "
            + (f"{FRACTION}={wanted:.3f}, or none, " if wanted <= 1 else "a larger device ")
            + f"or a memory budget smaller by {format_bytes(plan_bytes - pool)} would work"
        )
