"""XLA's own word on what a compiled program allocates; the only place that reads it."""

import dataclasses

import jax

from specmemo_jax.errors import CapacityError


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """Bytes a device of one compiled program."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """All that lives while the program runs, its arguments included.

        XLA's own ``peak_memory_in_bytes`` leaves the temporaries out on CPU.
        """
        return self.arguments + self.extra

    @property
    def extra(self) -> int:
        """What it needs beside its arguments."""
        return self.outputs - self.aliased + self.temporaries + self.code


def compiled_memory(compiled: jax.stages.Compiled) -> CompiledMemory:
    """Read ``memory_analysis()`` of a compiled program. Raises CapacityError where the backend has none."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise CapacityError(
            f"memory figures of a compiled program: {jax.default_backend()!r} gives none; "
            "cpu and cuda would work"
        )
    return CompiledMemory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class CompiledCheck:
    """What the compiler says of a plan's programs: bytes each needs beside the persistent buffers.

    ``compiled_for``: the device; ``dtype``: what was compiled, which is bfloat16 where float16 was
    planned for a CPU. ``generation_bytes``: persistent buffers without the target's weights, and the
    most that any program needs.
    """

    compiled_for: str
    dtype: str
    programs: tuple[tuple[str, int], ...]
    generation_bytes: int
