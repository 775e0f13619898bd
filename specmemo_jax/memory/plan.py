"""MemoryPlan: every static shape of the engine, and every buffer with its bytes before it exists.

`lay_out` prices one choice of shapes; `specmemo_jax.planning.search` searches among them. The words are
those of docs/memory-model.md.
"""

import dataclasses
import math

import jax.numpy as jnp

from specmemo_jax.devices.compiled import CompiledCheck
from specmemo_jax.devices.table import DeviceSpec
from specmemo_jax.errors import CapacityError, ConfigError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Groups
from specmemo_jax.memory.buffers import Buffer
from specmemo_jax.memory.footprint import (
    MAX_BAD_WORDS,
    MAX_STOP_IDS,
    Footprint,
    ProgramFootprint,
    footprint,
)
from specmemo_jax.memory.passes import DraftCost
from specmemo_jax.memory.workload import SLOTS, Workload

PREFILL_CHUNKS = (128, 32)
FIRST_CAPACITY = 256
POLICIES = ("plan", "unbounded", "unbounded-last-row")


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
    """Frozen shapes and bytes of one engine: B ``batch`` rows of at most ``context`` tokens.

    ``capacities``: the cache slots S a row can have; on CPU the cache grows through
    them, elsewhere there is one. ``groups``: rows and their contexts, rising to ``context``, where not all
    rows have the same; such rows' slots are fewer (`groups_at`).
    ``scoring``: the plan holds while given tokens are scored (`specmemo_jax.decode.score`), too.
    ``chunks``: prefill widths C, largest first.
    ``tree_nodes``: T, 1 without a drafter. ``tree_sizes``: trees to move between, rising from 1 (plain
    decoding) to T. ``score_nodes``, ``logit_nodes``: see `specmemo_jax.decode.step.Chunking`.
    ``footprint`` holds at the largest capacity, in bytes a device of ``shards``.
    """

    config: LlamaConfig
    dtype: str
    kv_dtype: str
    platform: str
    shards: int
    policy: str
    batch: int
    context: int
    capacities: tuple[int, ...]
    chunks: tuple[int, ...]
    drafter: DraftCost | None
    tree_nodes: int
    tree_sizes: tuple[int, ...]
    max_depth: int
    score_nodes: int | None
    logit_nodes: int | None
    footprint: Footprint
    max_stop_ids: int = MAX_STOP_IDS
    max_bad_words: tuple[int, int] = MAX_BAD_WORDS
    device: DeviceSpec | None = None
    workload: Workload | None = None
    expected: Expected | None = None
    bounds: Bounds | None = None
    proof: CompiledCheck | None = None
    groups: tuple[tuple[int, int], ...] = ()
    scoring: bool = False

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
    def drafter_name(self) -> str:
        """``"none"`` for plain decoding."""
        return "none" if self.drafter is None else self.drafter.name

    def capacity_for(self, slots: int) -> int:
        """The smallest capacity with at least ``slots`` slots a row."""
        for capacity in self.capacities:
            if capacity >= slots:
                return capacity
        raise CapacityError(f"a row needs {slots} cache slots, the plan has {self.capacities[-1]}")

    def groups_at(self, capacity: int) -> Groups:
        """The rows' cache slots while the widest have ``capacity``."""
        if not self.groups:
            return Groups.of(self.batch, capacity)
        *narrow, (widest, _) = self.groups
        sizes = [(rows, _slots(context, self.max_depth)) for rows, context in narrow]
        return Groups((*sizes, (widest, capacity))).within(capacity)

    @property
    def slack(self) -> int:
        """Slots a step may touch beyond a row's length."""
        return self.max_depth + 1

    @property
    def whole_prompts(self) -> bool:
        """Prompts are read in one piece, whatever it takes."""
        return self.policy != "plan"

    @property
    def terms(self) -> tuple[Buffer, ...]:
        """Persistent buffers and the temporaries of the program that needs most; they sum up, with the
        runtime reserve, to the theory's peak.
        """
        return (*self.buffers, *self.footprint.largest.terms)

    def resized(self, drafter: DraftCost | None, batch: int, context: int | None = None) -> "MemoryPlan":
        """The same choice with another drafter, number of rows or context, priced anew; of rows in groups
        the same share is taken out of each, and another context is the widest's.
        """
        groups = self.groups
        if groups and batch != self.batch:
            groups = _shares(groups, batch)
        if groups and context is not None:
            groups = (*groups[:-1], (groups[-1][0], context))
        return lay_out(
            self.config,
            dtype=self.dtype,
            platform=self.platform,
            batch=batch,
            context=self.context if context is None else context,
            drafter=drafter,
            chunks=self.chunks,
            score_nodes=self.score_nodes,
            logit_nodes=self.logit_nodes,
            shards=self.shards,
            policy=self.policy,
            device=self.device,
            kv_dtype=self.kv_dtype,
            groups=groups,
            scoring=self.scoring,
        )

    def at(self, tokens: int) -> "MemoryPlan":
        """The same plan while rows hold no more than ``tokens``: on CPU the cache has not grown further."""
        capacity = self.capacity_for(min(tokens, self.context) + self.slack)
        return _priced(self, tuple(c for c in self.capacities if c <= capacity))

    def table(self) -> str:
        """The terms and totals, one a line, for a terminal."""
        largest = self.footprint.largest.name
        rows = [(b.name, "x".join(map(str, b.shape)), b.dtype, b.bytes) for b in self.terms]
        rows += [("runtime reserve", "", "", self.reserve_bytes)] if self.reserve_bytes else []
        rows.append((f"peak ({largest})", "", "", self.peak_bytes))
        rows.append(("generation memory", "", "", self.generation_bytes))
        return "\n".join(f"{n:<34}{s:>22} {d:>9} {b / 2**20:>10.2f} MiB" for n, s, d, b in rows)


def lay_out(
    config: LlamaConfig,
    *,
    dtype: str | jnp.dtype,
    platform: str,
    batch: int,
    context: int,
    drafter: DraftCost | None = None,
    chunks: tuple[int, ...] = PREFILL_CHUNKS,
    score_nodes: int | None = None,
    logit_nodes: int | None = None,
    shards: int = 1,
    policy: str = "plan",
    device: DeviceSpec | None = None,
    workload: Workload | None = None,
    kv_dtype: str | None = None,
    groups: tuple[tuple[int, int], ...] = (),
    scoring: bool = False,
) -> MemoryPlan:
    """One choice of shapes, priced; ``kv_dtype`` None is ``dtype``; ``groups``: `MemoryPlan.groups`. Raises
    for a batch or a context that cannot be.
    """
    _check(config, batch, context, policy)
    _check_groups(groups, batch, context)
    groups = groups if len(groups) > 1 else ()
    depth = 0 if drafter is None else drafter.max_depth
    largest = _slots(context, depth)
    capacities = [largest]
    if platform == "cpu" and policy == "plan":
        capacities = [FIRST_CAPACITY * 2**i for i in range(32) if FIRST_CAPACITY * 2**i < largest] + [largest]
    if policy == "plan":
        narrowest = min(capacities[0], *(_slots(least, depth) for _, least in (*groups, (batch, context))))
        chunks = tuple(c for c in chunks if c <= narrowest) or (SLOTS // 2,)
    else:
        chunks = (largest,)
    plan = MemoryPlan(
        config=config,
        dtype=jnp.dtype(dtype).name,
        kv_dtype=kv_dtype or jnp.dtype(dtype).name,
        platform=platform,
        shards=shards,
        policy=policy,
        batch=batch,
        context=context,
        capacities=tuple(capacities),
        chunks=chunks,
        drafter=drafter,
        tree_nodes=1 if drafter is None else drafter.num_nodes,
        tree_sizes=(1,) if drafter is None else (1, *drafter.tree_sizes),
        max_depth=depth,
        score_nodes=score_nodes,
        logit_nodes=logit_nodes,
        footprint=Footprint((), (), 0),
        device=device,
        workload=workload,
        groups=groups,
        scoring=scoring,
    )
    return _priced(plan, plan.capacities)


def _slots(context: int, depth: int) -> int:
    """For so many tokens and a step's tree beyond them, in steps of `SLOTS`."""
    return -(-(context + depth + 1) // SLOTS) * SLOTS


def _shares(groups: tuple[tuple[int, int], ...], batch: int) -> tuple[tuple[int, int], ...]:
    """Groups of ``batch`` rows in about the same shares, the widest with a row at least."""
    all_rows, left, shares = sum(rows for rows, _ in groups), batch, []
    for rows, context in reversed(groups):
        own = min(left, max(0 if shares else 1, round(rows * batch / all_rows)))
        shares.append((own, context))
        left -= own
    (most, context), *rest = shares[::-1]
    return tuple((rows, context) for rows, context in ((most + left, context), *rest) if rows)


def _priced(plan: MemoryPlan, capacities: tuple[int, ...]) -> MemoryPlan:
    """The plan with these capacities and the footprint of the last."""
    whole = footprint(
        plan.config,
        plan.drafter,
        dtype=plan.dtype,
        platform=plan.platform,
        groups=plan.groups_at(capacities[-1]),
        chunks=plan.chunks,
        tree_sizes=plan.tree_sizes,
        shards=plan.shards,
        kv_dtype=plan.kv_dtype,
        score_nodes=plan.score_nodes,
        logit_nodes=plan.logit_nodes,
        policy=plan.policy,
        scoring=plan.scoring,
        compute_capability=None if plan.device is None else plan.device.compute_capability,
        reserve=0 if plan.device is None else plan.device.reserve_bytes,
    )
    if len(capacities) > 1:
        whole = dataclasses.replace(whole, programs=(*whole.programs, _growth(plan, capacities[-2])))
    return dataclasses.replace(plan, capacities=capacities, footprint=whole)


def _growth(plan: MemoryPlan, capacity: int) -> ProgramFootprint:
    """Growing to the last capacity: what is old beside what is new, of caches a layer at a time
    (`llama.kv.grow`), the drafter's state before the target's.
    """
    config, groups = plan.config, plan.groups_at(capacity)
    rows, slots = max(groups, key=math.prod)
    shape = (2, rows, config.num_kv_heads // plan.shards, slots, config.head_dim)
    scale = 4 if plan.kv_dtype == "int8" else 0  # a vector's, beside its numbers
    size = math.prod(shape[:-1]) * (config.head_dim * jnp.dtype(plan.kv_dtype).itemsize + scale)
    old = [Buffer("a layer's KV before", shape, plan.kv_dtype, size)]
    for buffer in () if plan.drafter is None else plan.drafter.buffers(groups):
        if buffer.kind == "cache":
            layers, *rest = buffer.shape
            old.append(
                Buffer(f"a layer of {buffer.name} before", tuple(rest), buffer.dtype, buffer.bytes // layers)
            )
        elif buffer.kind != "weights":
            old.append(dataclasses.replace(buffer, name=f"{buffer.name} before"))
    return ProgramFootprint("growth", tuple(old))


def _check_groups(groups: tuple[tuple[int, int], ...], batch: int, context: int) -> None:
    if not groups:
        return
    contexts = [own for _, own in groups]
    if any(rows < 1 or own < 1 for rows, own in groups) or sorted(set(contexts)) != contexts:
        raise ConfigError(f"groups {groups}: rows and contexts of at least 1, contexts rising, would work")
    if sum(rows for rows, _ in groups) != batch or contexts[-1] != context:
        raise ConfigError(f"groups {groups} are not of {batch} rows up to context {context}")


def _check(config: LlamaConfig, batch: int, context: int, policy: str) -> None:
    if policy not in POLICIES:
        raise ConfigError(f"policy {policy!r} is not known; {', '.join(map(repr, POLICIES))} would work")
    if batch < 1:
        raise ConfigError(f"max_batch must be at least 1, found {batch}")
    if context < 1:
        raise ConfigError(f"max_context must be at least 1, found {context}")
    if context > config.max_context:
        why = (
            " (beyond it 'dynamic' rope scaling changes with the length, which a tree's nodes do not share)"
            if config.rope_scaling.kind == "dynamic"
            else ""
        )
        raise CapacityError(f"max_context {context} exceeds the model's {config.max_context}{why}")


def make_plan(
    config: LlamaConfig,
    *,
    dtype: str | jnp.dtype,
    platform: str,
    batch: int = 1,
    context: int | None = None,
    drafter: DraftCost | None = None,
    policy: str = "plan",
) -> MemoryPlan:
    """`lay_out` with the usual chunks at the given context, or the model's own maximum."""
    context = config.max_context if context is None else context
    return lay_out(
        config, dtype=dtype, platform=platform, batch=batch, context=context, drafter=drafter, policy=policy
    )
