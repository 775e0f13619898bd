"""MemoryPlan: every static shape of the engine, and every buffer with its bytes before it exists.

`lay_out` prices one choice of shapes; `specmemo_jax.planning.search` searches among them. The words are
those of docs/memory-model.md.
"""

import dataclasses

from specmemo_jax.devices.compiled import CompiledCheck
from specmemo_jax.devices.table import DeviceSpec
from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.llama.buffers import Buffer
from specmemo_jax.memory.footprint import Footprint, footprint
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.memory.workload import Workload


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a plan is expected to do for its workload, and where the numbers came from.

    ``vanilla_tokens_per_second``: the best plan without a drafter, for all rows together like
    ``tokens_per_second``. ``accepted_length``: tokens a row a step, bonus token counted. ``cache_source``:
    what a lossy cache changes, empty for one that is not.
    """

    tokens_per_second: float
    vanilla_tokens_per_second: float
    accepted_length: float
    speed_source: str
    acceptance_source: str
    cache_source: str = ""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """In bytes a device, for one workload: the least budget that keeps 96% of the best expected
    throughput, the least with any plan, and the least with a drafter (None where none was allowed).
    ``most_rows``: the largest batch that any plan fits the budget with, where the batch was left open.
    """

    lower_bound: int
    least_budget: int
    least_speculative_budget: int | None
    most_rows: int | None = None


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The shapes of one engine and their bytes a device, at the largest capacity.

    The engine runs by ``shapes`` alone. What follows ``footprint`` is reported: the device and the workload
    it was made for, what is `Expected` of it, the `Bounds` of the memory, and the compiler's own figures.
    """

    shapes: Shapes
    footprint: Footprint
    device: DeviceSpec | None = None
    workload: Workload | None = None
    expected: Expected | None = None
    bounds: Bounds | None = None
    proof: CompiledCheck | None = None

    @property
    def batch(self) -> int:
        """B rows (`Shapes`)."""
        return self.shapes.batch

    @property
    def context(self) -> int:
        """The most tokens a row may hold (`Shapes`)."""
        return self.shapes.context

    @property
    def drafter(self) -> Drafter | None:
        """What proposes (`Shapes`)."""
        return self.shapes.drafter

    @property
    def tree_nodes(self) -> int:
        """T (`Shapes`)."""
        return self.shapes.tree_nodes

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Persistent ones."""
        return self.footprint.persistent

    @property
    def weights_bytes(self) -> int:
        """The target's weights, as packed."""
        return self.footprint.weights_bytes

    @property
    def reserve_bytes(self) -> int:
        """What the runtime takes beside its allocator: context, libraries."""
        return self.footprint.reserve

    @property
    def temporary_bytes(self) -> int:
        """Of the program that needs most beside the persistent buffers."""
        return self.peak_bytes - self.reserve_bytes - sum(b.bytes for b in self.buffers)

    @property
    def model_generation_bytes(self) -> int:
        """The theory's figure."""
        return self.footprint.generation_bytes

    @property
    def generation_bytes(self) -> int:
        """What is promised: the theory's figure, or the compiler's where that was asked for and is larger."""
        proved = 0 if self.proof is None else self.proof.generation_bytes
        return max(self.model_generation_bytes, proved)

    @property
    def peak_bytes(self) -> int:
        """Runtime reserve, weights and generation memory."""
        return self.reserve_bytes + self.weights_bytes + self.generation_bytes

    @property
    def terms(self) -> tuple[Buffer, ...]:
        """Persistent buffers and the temporaries of the program that needs most; they sum up, with the
        runtime reserve, to the theory's peak.
        """
        return (*self.buffers, *self.footprint.largest.terms)

    def resized(self, drafter: Drafter | None, batch: int, context: int | None = None) -> "MemoryPlan":
        """`Shapes.resized`, priced anew for the same device."""
        return lay_out(self.shapes.resized(drafter, batch, context), self.device)

    def at(self, tokens: int) -> "MemoryPlan":
        """The same plan while rows hold no more than ``tokens`` (`Shapes.at`)."""
        shapes = self.shapes.at(tokens)
        return dataclasses.replace(self, shapes=shapes, footprint=footprint(shapes, self.device))

    def table(self) -> str:
        """The terms and totals, one a line, for a terminal."""
        largest = self.footprint.largest.name
        rows = [(b.name, "x".join(map(str, b.shape)), b.dtype, b.bytes) for b in self.terms]
        rows += [("runtime reserve", "", "", self.reserve_bytes)] if self.reserve_bytes else []
        rows.append((f"peak ({largest})", "", "", self.peak_bytes))
        rows.append(("generation memory", "", "", self.generation_bytes))
        return "\n".join(f"{n:<34}{s:>22} {d:>9} {b / 2**20:>10.2f} MiB" for n, s, d, b in rows)


def lay_out(shapes: Shapes, device: DeviceSpec | None = None, workload: Workload | None = None) -> MemoryPlan:
    """The plan of one choice of shapes: every buffer priced, on a ``device`` with its reserve where given."""
    return MemoryPlan(shapes, footprint(shapes, device), device, workload)
