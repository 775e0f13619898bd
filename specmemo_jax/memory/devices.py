"""What the live device can do and how much memory it has."""

from typing import Any, Protocol, runtime_checkable


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


def default_dtype(device: Device) -> str:
    """float32 on CPU (exact, and XLA's fastest path there), bfloat16 on GPUs that have it, else float16."""
    if device.platform == "cpu":
        return "float32"
    capability = getattr(device, "compute_capability", None)
    try:
        has_bf16 = capability is None or float(capability) >= 8.0
    except ValueError:  # ROCm answers with an architecture name; all that JAX supports have bfloat16
        has_bf16 = True
    return "bfloat16" if has_bf16 else "float16"


def device_memory(device: Device) -> int | None:
    """Bytes the allocator may use on ``device``; None where it does not say (CPU)."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return None if not stats else stats.get("bytes_limit")
