"""Shapes: one choice of every static size of an engine, from which programs are lowered and plans priced."""

import dataclasses
import functools
from typing import Any

from specmemo_jax.draft.protocol import Drafter, TreeLimits
from specmemo_jax.errors import CapacityError, ConfigError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import SLOTS, Groups

PREFILL_CHUNKS = (128, 64, 32)
FIRST_CAPACITY = 256
POLICIES = ("plan", "unbounded", "unbounded-last-row")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """B ``batch`` rows of at most ``context`` tokens, and how passes over them are cut.

    Attributes:
        config: the target's.
        dtype: of the weights, and of the cache where ``kv_dtype`` (else ``"int8"``) is None.
        platform: ``"cpu"`` or ``"gpu"``.
        drafter: what proposes; None for plain decoding.
        chunks: prefill widths C, largest first; those that the narrowest row does not hold are left out.
        score_nodes, logit_nodes: see `specmemo_jax.decode.step.Chunking`.
        shards: devices that split the target; the drafter is whole on each.
        policy: ``"plan"``; ``"unbounded"`` and ``"unbounded-last-row"`` are baselines to compare with.
        groups: rows and their contexts, rising to ``context``, where not all rows have the same; such rows'
            slots are fewer (`groups_at`).
        scoring: given tokens are scored (`specmemo_jax.decode.score`), too.
        capacities: the cache slots S that a row can have. On CPU the cache grows through them, elsewhere
            there is one. Left empty they follow from the context.

    Raises:
        ConfigError: for a batch, context, policy or groups that cannot be.
        CapacityError: for a context beyond the model's.
    """

    config: LlamaConfig
    dtype: str
    platform: str
    context: int
    batch: int = 1
    drafter: Drafter | None = None
    chunks: tuple[int, ...] = PREFILL_CHUNKS
    score_nodes: int | None = None
    logit_nodes: int | None = None
    shards: int = 1
    policy: str = "plan"
    kv_dtype: str | None = None
    groups: tuple[tuple[int, int], ...] = ()
    scoring: bool = False
    capacities: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check()
        if len(self.groups) < 2:
            self._settle(groups=())
        if not self.capacities:
            self._settle(capacities=self._all_capacities())
        chunks: tuple[int, ...] = (self.capacities[-1],)
        if not self.whole_prompts:
            contexts = [context for _, context in self.groups] or [self.context]
            narrowest = min(self.capacities[0], *map(self._slots, contexts))
            chunks = tuple(c for c in self.chunks if c <= narrowest) or (SLOTS // 2,)
        self._settle(chunks=chunks)

    def _settle(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _slots(self, context: int) -> int:
        """For so many tokens and a step's tree beyond them, in steps of `SLOTS`."""
        return -(-(context + self.slack) // SLOTS) * SLOTS

    def _all_capacities(self) -> tuple[int, ...]:
        largest, capacity, smaller = self._slots(self.context), FIRST_CAPACITY, []
        while self.platform == "cpu" and not self.whole_prompts and capacity < largest:
            smaller.append(capacity)
            capacity *= 2
        return (*smaller, largest)

    @functools.cached_property
    def trees(self) -> TreeLimits:
        """The drafter's trees; the root alone without one."""
        return TreeLimits.of(self.drafter)

    @property
    def tree_nodes(self) -> int:
        """T, 1 without a drafter."""
        return self.trees.num_nodes

    @property
    def tree_sizes(self) -> tuple[int, ...]:
        """Sizes of tree that a step is compiled for: 1 (plain decoding), then the drafter's, rising to T."""
        return (1, *self.trees.tree_sizes)

    @property
    def slack(self) -> int:
        """Slots a step may touch beyond a row's length."""
        return self.trees.max_depth + 1

    @property
    def cache_dtype(self) -> str:
        """Of the target's cache."""
        return self.kv_dtype or self.dtype

    @property
    def whole_prompts(self) -> bool:
        """Prompts are read in one piece, whatever it takes."""
        return self.policy != "plan"

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
        sizes = [(rows, self._slots(context)) for rows, context in narrow]
        return Groups((*sizes, (widest, capacity))).within(capacity)

    def at(self, tokens: int) -> "Shapes":
        """The same while rows hold no more than ``tokens``: on CPU the cache has not grown further."""
        capacity = self.capacity_for(min(tokens, self.context) + self.slack)
        return dataclasses.replace(self, capacities=tuple(c for c in self.capacities if c <= capacity))

    def resized(self, drafter: Drafter | None, batch: int, context: int | None = None) -> "Shapes":
        """The same choice with another drafter, number of rows or context; of rows in groups the same share
        is taken out of each, and another context is the widest's.
        """
        groups, context = self.groups, self.context if context is None else context
        if groups and batch != self.batch:
            groups = _shares(groups, batch)
        if groups:
            groups = (*groups[:-1], (groups[-1][0], context))
        return dataclasses.replace(
            self, drafter=drafter, batch=batch, context=context, groups=groups, capacities=()
        )

    def _check(self) -> None:
        batch, context, groups, config = self.batch, self.context, self.groups, self.config
        if self.policy not in POLICIES:
            raise ConfigError(
                f"policy {self.policy!r} is not known; {', '.join(map(repr, POLICIES))} would work"
            )
        if batch < 1:
            raise ConfigError(f"max_batch must be at least 1, found {batch}")
        if context < 1:
            raise ConfigError(f"max_context must be at least 1, found {context}")
        if context > config.max_context:
            why = (
                " (beyond it 'dynamic' rope scaling changes with the length, not shared by a tree's nodes)"
                if config.rope_scaling.kind == "dynamic"
                else ""
            )
            raise CapacityError(f"max_context {context} exceeds the model's {config.max_context}{why}")
        contexts = [own for _, own in groups]
        if any(rows < 1 or own < 1 for rows, own in groups) or sorted(set(contexts)) != contexts:
            raise ConfigError(
                f"groups {groups}: rows and contexts of at least 1, contexts rising, would work"
            )
        if groups and (sum(rows for rows, _ in groups) != batch or contexts[-1] != context):
            raise ConfigError(f"groups {groups} are not of {batch} rows up to context {context}")


def _shares(groups: tuple[tuple[int, int], ...], batch: int) -> tuple[tuple[int, int], ...]:
    """Groups of ``batch`` rows in about the same shares, the widest with a row at least."""
    all_rows, left, shares = sum(rows for rows, _ in groups), batch, []
    for rows, context in reversed(groups):
        own = min(left, max(0 if shares else 1, round(rows * batch / all_rows)))
        shares.append((own, context))
        left -= own
    (most, context), *rest = shares[::-1]
    return tuple((rows, context) for rows, context in ((most + left, context), *rest) if rows)
