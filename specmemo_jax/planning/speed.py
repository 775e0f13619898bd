"""How long passes take: from a device's data sheet (roofline), or from what was measured on it.

The roofline (Williams et al., 2009) takes the larger of bytes over bandwidth and operations over peak
rate; a small pass adds the time between its many small kernels.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.buffers import Cost
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.memory.workload import Workload
from specmemo_jax.planning.calibration import Calibration, StepPoint, config_hash

# A layer's kernels: two norms, four matrix products (QKV and gate/up fused), rotation, scores, softmax,
# values, activation, cache write.
KERNELS_A_LAYER = 12
# What a kernel costs beside its own reading and computing. cpu: SmolLM2-135M's 30 layers take 10 ms a step
# between their products and attention (measured on two AMX cores, jax 0.10). cuda: an estimate: launched one
# after the other, kernels of 2.9 µs took 3.4 to 3.8 µs each (NVIDIA, "Getting Started with CUDA Graphs"), and
# the shortest run some 2 µs. rocm: an estimate, twice CUDA's. `specmemo calibrate` replaces all three.
KERNEL_SECONDS: Mapping[str, float] = {"cpu": 28e-6, "cuda": 2.5e-6, "rocm": 5e-6}
# One small sum over all devices of a mesh, two a layer: an estimate of NCCL's and RCCL's latency in one box.
COLLECTIVE_SECONDS = 15e-6
_FLOAT32 = 4


class DeviceFigures(Protocol):
    """What `roofline` reads of a device (`specmemo_jax.devices.table.DeviceSpec`)."""

    @property
    def slug(self) -> str:
        """Its short name."""
        ...

    @property
    def platform(self) -> str:
        """``"cpu"``, ``"cuda"`` or ``"rocm"``."""
        ...

    @property
    def bandwidth(self) -> float:
        """Bytes/s."""
        ...

    @property
    def flops(self) -> Mapping[str, float]:
        """Dense FLOP/s by dtype name."""
        ...


class SpeedModel(Protocol):
    """Seconds of the engine's passes. ``dtype`` is the weights' and the cache's name, ``length`` the cache
    slots a row that attention reads (the engine's reads all S of the capacity at hand, whatever is in them),
    ``shards`` the devices of the mesh.
    """

    @property
    def source(self) -> str:
        """Where the figures come from, in one line."""
        ...

    def step_seconds(
        self, config: LlamaConfig, dtype: str, batch: int, nodes: int, length: int, shards: int = 1
    ) -> float:
        """One step without its drafting: ``batch`` rows verify ``nodes`` nodes each, accept and commit."""
        ...

    def prefill_seconds(
        self, config: LlamaConfig, dtype: str, tokens: int, chunk: int, shards: int = 1
    ) -> float:
        """The prompt of one row: ``tokens`` in chunks of ``chunk``; rows are prefilled one by one."""
        ...

    def draft_seconds(self, work: Cost, dtype: str) -> float:
        """One step's drafting."""
        ...


def pass_cost(
    config: LlamaConfig,
    dtype: str,
    batch: int,
    nodes: int,
    length: int,
    head_rows: int,
    shards: int = 1,
    cache_item: float | None = None,
) -> Cost:
    """What one pass over ``batch * nodes`` rows reads and computes on each device.

    Bytes: every matrix once with the head, the cache's ``length`` slots a row and the new ones, the
    activations between the products, scores (written, normalised, read again) and logits in float32.
    ``cache_item``: bytes that a number of the cache costs, None for those of ``dtype``.
    """
    H, D, F, V = config.hidden_size, config.head_dim, config.ffn_size, config.vocab_size
    L, N, K = config.num_layers, config.num_heads, config.num_kv_heads
    rows, item = batch * nodes, jnp.dtype(dtype).itemsize
    layer = 2 * H * D * (N + K) + 3 * H * F
    weights = item * (L * layer + V * H)
    cache = (item if cache_item is None else cache_item) * 2 * L * K * D * (batch * length + rows)
    activations = item * rows * L * (2 * (N + K) * D + 3 * F) + _FLOAT32 * 3 * rows * L * N * length
    whole = item * rows * L * 6 * H  # the residual sum and the norms, which every device holds
    logits = _FLOAT32 * 2 * head_rows * V
    flops = 2 * (rows * L * layer + head_rows * V * H) + 4 * rows * L * N * D * (length + nodes)
    return Cost(
        layers=L, flops=flops / shards, bytes=(weights + cache + activations + logits) / shards + whole
    )


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Times from ``bandwidth`` (bytes/s), peak ``flops`` by dtype and ``layer_seconds`` beside them.

    ``cache_item``: see `pass_cost`.
    """

    bandwidth: float
    flops: Mapping[str, float]
    layer_seconds: float
    source: str
    cache_item: float | None = None

    def seconds(self, work: Cost, dtype: str) -> float:
        """Time of so much work. Raises ConfigError for a dtype that the device has no rate for."""
        name = jnp.dtype(dtype).name
        if name not in self.flops:
            raise ConfigError(f"{self.source}: no rate for {name}; {', '.join(self.flops)} would work")
        return max(work.bytes / self.bandwidth, work.flops / self.flops[name]) + work.layers * (
            self.layer_seconds
        )

    def step_seconds(
        self, config: LlamaConfig, dtype: str, batch: int, nodes: int, length: int, shards: int = 1
    ) -> float:
        """See `SpeedModel`."""
        work = pass_cost(config, dtype, batch, nodes, length, batch * nodes, shards, self.cache_item)
        return self.seconds(work, dtype) + _collectives(config, shards)

    def prefill_seconds(
        self, config: LlamaConfig, dtype: str, tokens: int, chunk: int, shards: int = 1
    ) -> float:
        """See `SpeedModel`; each chunk as at the mean length."""
        work = pass_cost(config, dtype, 1, chunk, tokens // 2, 1, shards, self.cache_item)
        return math.ceil(tokens / chunk) * (self.seconds(work, dtype) + _collectives(config, shards))

    def draft_seconds(self, work: Cost, dtype: str) -> float:
        """See `SpeedModel`."""
        return self.seconds(work, dtype)


def roofline(device: DeviceFigures, cache_item: float | None = None) -> Roofline:
    """Times of a device that nothing was measured on."""
    return Roofline(
        bandwidth=device.bandwidth,
        flops=device.flops,
        layer_seconds=KERNELS_A_LAYER * KERNEL_SECONDS[device.platform],
        source=f"roofline estimate from the data sheet of {device.slug}",
        cache_item=cache_item,
    )


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Times from measured points, monotone in batch, nodes and length.

    At the shortest measured length and one row the step is a piecewise linear, never falling curve over
    rows (batch x nodes). What longer caches and more rows add is linear in the slots read and in
    rows x slots, by non-negative least squares. Beyond the most rows measured the curve is scaled as a
    roofline of the measured bandwidth and rate grows; `beyond` says when.
    """

    calibration: Calibration

    @property
    def source(self) -> str:
        """Device and date."""
        return f"calibrated on {self.calibration.fingerprint.device}, {self.calibration.date}"

    def beyond(self, batch: int, nodes: int, length: int) -> str:
        """In words, in what way a step lies outside of what was measured; empty inside."""
        rows = max(p.batch * p.nodes for p in self._curve_points)
        longest = max(p.capacity for p in self.calibration.steps)
        outside = []
        if batch * nodes > rows:
            outside.append(f"{batch * nodes} rows a pass, measured to {rows}: scaled by roofline")
        if length > longest:
            outside.append(f"{length} slots, measured to {longest}: extended linearly")
        return "; ".join(outside)

    def step_seconds(
        self, config: LlamaConfig, dtype: str, batch: int, nodes: int, length: int, shards: int = 1
    ) -> float:
        """See `SpeedModel`. Raises ConfigError for another model, dtype or mesh than was measured."""
        self._check(config, dtype, shards)
        slots, products = self._extra(batch, nodes, length)
        by_slots, by_products = self._slopes
        return self._at_rows(config, batch * nodes) + by_slots * slots + by_products * products

    def prefill_seconds(
        self, config: LlamaConfig, dtype: str, tokens: int, chunk: int, shards: int = 1
    ) -> float:
        """See `SpeedModel`."""
        self._check(config, dtype, shards)
        points = sorted((p.chunk, p.seconds) for p in self.calibration.prefills)
        widths, seconds = [width for width, _ in points], _rising([s for _, s in points])
        each = float(np.interp(chunk, widths, seconds))
        if chunk > widths[-1]:
            each *= self._roof(config, chunk, 1) / self._roof(config, widths[-1], 1)
        longer = max(0, tokens // 2 - self.calibration.prefills[0].capacity)
        by_slots, by_products = self._slopes
        return math.ceil(tokens / chunk) * (each + longer * (by_slots + by_products * chunk))

    def draft_seconds(self, work: Cost, dtype: str) -> float:
        """See `SpeedModel`: the measured drafter of as many layers and nearest in operations, scaled as the
        roofline's time grows; the roofline where none was measured.
        """
        name, ours = jnp.dtype(dtype).name, self.calibration
        roof = Roofline(
            ours.bandwidth, {ours.fingerprint.dtype: ours.flops}, self._layer_seconds, self.source
        )
        alike = [p for p in ours.drafts if p.work.layers == work.layers]
        if not alike:
            return roof.seconds(work, name)
        nearest = min(alike, key=lambda p: abs(p.work.flops - work.flops))
        measured = roof.seconds(nearest.work, name)
        return nearest.seconds * (roof.seconds(work, name) / measured if measured else 1.0)

    def _check(self, config: LlamaConfig, dtype: str, shards: int) -> None:
        ours = self.calibration.fingerprint
        name = jnp.dtype(dtype).name
        if (config_hash(config), name, shards) != (ours.config_hash, ours.dtype, 1):
            raise ConfigError(
                f"asked for a model of {config.num_layers} layers in {name} on {shards} device(s); measured "
                f"was {ours.model} in {ours.dtype} on one; that, or a roofline estimate, would work"
            )

    @cached_property
    def _base(self) -> int:
        """The shortest capacity at which one row was measured with more than one number of nodes."""
        return self.calibration.base_capacity

    @cached_property
    def _curve_points(self) -> tuple[StepPoint, ...]:
        chosen = [p for p in self.calibration.steps if p.batch == 1 and p.capacity == self._base]
        return tuple(sorted(chosen, key=lambda p: p.nodes))

    def _at_rows(self, config: LlamaConfig | None, rows: int) -> float:
        at = [p.nodes for p in self._curve_points]
        curve = _rising([p.seconds for p in self._curve_points])
        seconds = float(np.interp(rows, at, curve))
        if rows > at[-1] and config is not None:
            seconds *= self._roof(config, rows, rows) / self._roof(config, at[-1], at[-1])
        return seconds

    def _roof(self, config: LlamaConfig, rows: int, head_rows: int) -> float:
        """The roofline's time of a pass of one row at the base capacity, from measured rates."""
        ours = self.calibration
        work = pass_cost(config, ours.fingerprint.dtype, 1, rows, self._base, head_rows)
        return max(work.bytes / ours.bandwidth, work.flops / ours.flops)

    def _extra(self, batch: int, nodes: int, length: int) -> tuple[int, int]:
        """Slots read, and rows x slots, beyond those of one row at the base capacity."""
        return max(0, batch * length - self._base), batch * nodes * max(0, length - self._base)

    @cached_property
    def _slopes(self) -> tuple[float, float]:
        """Seconds a slot read, and a row and slot."""
        others = [p for p in self.calibration.steps if p not in self._curve_points]
        most = self._curve_points[-1].nodes
        others = [p for p in others if p.batch * p.nodes <= most]
        if not others:
            return 0.0, 0.0
        extra = np.asarray([self._extra(p.batch, p.nodes, p.capacity) for p in others], float)
        over = np.asarray([p.seconds - self._at_rows(None, p.batch * p.nodes) for p in others])
        scale = np.maximum(extra.max(axis=0), 1.0)
        by_slots, by_products = nnls(extra / scale, over)[0] / scale
        return float(by_slots), float(by_products)

    @cached_property
    def _layer_seconds(self) -> float:
        """What a layer of the smallest step took beside the roofline's time."""
        ours = self.calibration
        return max(0.0, self._curve_points[0].seconds - ours.smallest_roof_seconds) / ours.num_layers


def calibrated(calibration: Calibration) -> Calibrated:
    """Times from what was measured on this device, for the model and dtype that it was measured with."""
    return Calibrated(calibration)


def tokens_per_second(workload: Workload, step_s: float, accepted_length: float, prefill_s: float) -> float:
    """New tokens of all rows over the whole time: ``prefill_s`` seconds for all prompts, which brings each
    row's first token, then steps of ``step_s`` seconds that bring ``accepted_length`` tokens a row.
    """
    steps = (workload.new_tokens - 1) / accepted_length
    return workload.rows * workload.new_tokens / (prefill_s + steps * step_s)


def _collectives(config: LlamaConfig, shards: int) -> float:
    return 2 * config.num_layers * COLLECTIVE_SECONDS if shards > 1 else 0.0


def _rising(values: Sequence[float]) -> list[float]:
    """The running maximum: a measured curve without the dips of noise."""
    return list(itertools.accumulate(values, max))
