"""The search: the most expected tokens a second under a budget, and the bounds of memory that follow from it.

Candidates are few hundreds: every drafter and tree offered (none included), prefill chunk, and how many
nodes' scores and logits exist at once. Each is priced by the theory alone.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp

from specmemo_jax.devices.table import DeviceSpec
from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.errors import BudgetError, CapacityError
from specmemo_jax.files.byte_size import format_bytes
from specmemo_jax.llama.buffers import Cost
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import SLOTS
from specmemo_jax.memory.plan import Bounds, Expected, MemoryPlan, lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.memory.workload import Workload, groups_for
from specmemo_jax.planning.profile import ExpectedAcceptance
from specmemo_jax.planning.speed import SpeedModel, tokens_per_second

BATCH_CHOICES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)  # to choose a batch among
MIN_BATCH_GAIN = 1.02  # of the throughput, by a larger batch that is to be chosen
KEPT_THROUGHPUT = 0.96  # of the best, at the lower bound
CHUNKS = ((256, 64), (128, 64, 32), (64, 32), (32,))
SCORE_NODES = (None, 32)
LOGIT_NODES = (None, 8)
PLAIN = ExpectedAcceptance(1.0, ((1, 1.0),), "plain decoding")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A drafter that may be chosen, None for plain decoding, and what a step of it is expected to bring."""

    drafter: Drafter | None = None
    expected_acceptance: ExpectedAcceptance = PLAIN


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for, beside budget and drafters: bytes and times are a device's of ``shards``."""

    config: LlamaConfig
    dtype: str
    device: DeviceSpec
    workload: Workload
    shards: int = 1
    policy: str = "plan"
    kv_dtype: str | None = None  # None: as ``dtype``
    cache_source: str = ""  # what is known of the effect of a lossy one
    scoring: bool = False  # given tokens are scored, too

    @property
    def platform(self) -> str:
        """As JAX spells it: CUDA and ROCm are both ``"gpu"``."""
        return "cpu" if self.device.platform == "cpu" else "gpu"

    @property
    def context(self) -> int:
        """The one asked for, or the least that holds the workload."""
        return self.workload.context or self.workload.tokens


def candidates(request: PlanRequest, offered: Sequence[Candidate], speed: SpeedModel) -> list[MemoryPlan]:
    """Every plan worth considering for the request's least context, each with what is expected of it."""
    if request.workload.context is None and request.context > request.config.max_context:
        raise CapacityError(
            f"{request.workload.prompt_tokens} prompt tokens and {request.workload.new_tokens} new ones: "
            f"the model's context holds {request.config.max_context}; fewer tokens would work"
        )
    some = slice(None) if request.policy == "plan" else slice(1)
    plans = [
        (candidate, _lay_out(request, candidate, request.context, chunk, scores, logits))
        for candidate, chunk, scores, logits in itertools.product(
            offered, CHUNKS[some], SCORE_NODES[some], LOGIT_NODES[some]
        )
        if logits is None or _nodes(candidate) > logits
    ]
    speeds = [_speed(plan, candidate, request, speed) for candidate, plan in plans]
    alone = Candidate()
    plain = max(
        _speed(_lay_out(request, alone, request.context, c), alone, request, speed) for c in CHUNKS[some]
    )
    return [
        dataclasses.replace(
            plan,
            expected=Expected(
                tokens_per_second=rate,
                vanilla_tokens_per_second=plain,
                accepted_length=candidate.expected_acceptance.accepted_length,
                speed_source=speed.source,
                acceptance_source=candidate.expected_acceptance.source,
                cache_source=request.cache_source,
            ),
        )
        for (candidate, plan), rate in zip(plans, speeds, strict=True)
    ]


def bounds(plans: Sequence[MemoryPlan], memory: int) -> Bounds:
    """The bounds that `candidates` of one workload give on a device of ``memory`` bytes."""
    most = best_within(plans, memory) or best_within(plans, max(plan.peak_bytes for plan in plans))
    assert most is not None
    fast = [plan.peak_bytes for plan in plans if _rate(plan) >= KEPT_THROUGHPUT * _rate(most)]
    drafting = [plan.peak_bytes for plan in plans if plan.drafter is not None]
    return Bounds(
        lower_bound=min(fast),
        least_budget=min(plan.peak_bytes for plan in plans),
        least_speculative_budget=min(drafting, default=None),
    )


def best_within(plans: Sequence[MemoryPlan], budget: int) -> MemoryPlan | None:
    """The fastest plan under a budget, of equally fast ones the smallest; None where none fits."""
    fitting = [plan for plan in plans if plan.peak_bytes <= budget]
    return min(fitting, key=lambda plan: (-_rate(plan), plan.peak_bytes), default=None)


def search(
    request: PlanRequest, offered: Sequence[Candidate], speed: SpeedModel, budget: int | None = None
) -> MemoryPlan:
    """The plan of most expected tokens a second whose peak fits ``budget`` bytes a device (None: its memory).

    A context that was asked for is kept; an open one becomes the largest that fits with the drafter and
    shapes that are best at the least, and the plan is the one for that context. A batch that was left open
    is the fastest of `BATCH_CHOICES` that fits. Raises BudgetError, with the least budget and the nearest
    plan.
    """
    if request.workload.batch is None:
        return _search_batch(request, offered, speed, budget)
    memory = request.device.memory_bytes
    plans = candidates(request, offered, speed)
    found = bounds(plans, memory)
    if budget is not None and budget > memory:
        raise BudgetError(
            f"memory_budget {format_bytes(budget)} is more than {request.device.name} has "
            f"({format_bytes(memory)}); "
            f"a budget from {found.least_budget} bytes ({format_bytes(found.least_budget)}) "
            "up to that would work",
            least_budget=found.least_budget,
            least_speculative_budget=found.least_speculative_budget,
        )
    limit = memory if budget is None else budget
    best = best_within(plans, limit)
    if best is None:
        nearest = min(plans, key=lambda plan: plan.peak_bytes)
        raise _too_small(request, limit, budget is None, dataclasses.replace(nearest, bounds=found))
    if request.workload.context is None:
        # The choice is made anew: what is fastest depends on how many slots a step reads.
        widest = _largest_context(best, limit)
        return search(_with_workload(request, context=widest), offered, speed, budget)
    return dataclasses.replace(best, bounds=found)


def _search_batch(
    request: PlanRequest, offered: Sequence[Candidate], speed: SpeedModel, budget: int | None
) -> MemoryPlan:
    """The plan for the batch of most tokens a second in all; more rows only for `MIN_BATCH_GAIN`."""
    best = search(_with_workload(request, batch=1), offered, speed, budget)
    for batch in BATCH_CHOICES[1:]:
        try:
            found = search(_with_workload(request, batch=batch), offered, speed, budget)
        except BudgetError:
            break
        if _rate(found) > MIN_BATCH_GAIN * _rate(best):
            best = found
    limit = request.device.memory_bytes if budget is None else budget
    assert best.bounds is not None
    return dataclasses.replace(
        best, bounds=dataclasses.replace(best.bounds, most_rows=_most_rows(request, limit))
    )


def _with_workload(request: PlanRequest, **changes: int) -> PlanRequest:
    return dataclasses.replace(request, workload=dataclasses.replace(request.workload, **changes))


def _most_rows(request: PlanRequest, limit: int) -> int:
    """The largest batch that fits ``limit`` bytes with the least context and plain decoding."""

    def fits(batch: int) -> bool:
        sized, lean = _with_workload(request, batch=batch), CHUNKS[-1]
        return _lay_out(sized, Candidate(), request.context, lean, SCORE_NODES[-1]).peak_bytes <= limit

    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def frontier(plans: Sequence[MemoryPlan]) -> list[MemoryPlan]:
    """Plans that no smaller one is as fast as, by rising peak."""
    kept: list[MemoryPlan] = []
    for plan in sorted(plans, key=lambda plan: (plan.peak_bytes, -_rate(plan))):
        if not kept or _rate(plan) > _rate(kept[-1]):
            kept.append(plan)
    return kept


def _nodes(candidate: Candidate) -> int:
    return 1 if candidate.drafter is None else candidate.drafter.num_nodes


def _lay_out(
    request: PlanRequest,
    candidate: Candidate,
    context: int,
    chunks: tuple[int, ...],
    score_nodes: int | None = None,
    logit_nodes: int | None = None,
) -> MemoryPlan:
    B = request.workload.rows
    groups = groups_for(request.workload.lengths, B, context) if request.policy == "plan" else ()
    shapes = Shapes(
        config=request.config,
        dtype=request.dtype,
        platform=request.platform,
        batch=B,
        context=context,
        drafter=candidate.drafter,
        chunks=chunks,
        score_nodes=score_nodes,
        logit_nodes=logit_nodes,
        shards=request.shards,
        policy=request.policy,
        kv_dtype=request.kv_dtype,
        groups=groups,
        scoring=request.scoring,
    )
    return lay_out(shapes, request.device, request.workload)


def _speed(plan: MemoryPlan, candidate: Candidate, request: PlanRequest, speed: SpeedModel) -> float:
    """Expected new tokens a second of all rows, prefill counted."""
    config, dtype, B, shards = request.config, request.dtype, request.workload.rows, request.shards
    work = request.workload
    shapes, halfway = plan.shapes, work.prompt_tokens + work.new_tokens // 2
    slots = shapes.capacity_for(min(halfway, shapes.context) + shapes.slack)
    step = 0.0
    for nodes, share in candidate.expected_acceptance.widths_of_batch(B):
        if share:
            step += share * speed.step_seconds(config, dtype, B, nodes, slots, shards)
            step += share * speed.draft_seconds(_rereading(shapes, nodes, slots), dtype)
    if candidate.drafter is not None:
        item = jnp.dtype(dtype).itemsize
        step += speed.draft_seconds(candidate.drafter.work(config, item, B, slots), dtype)
    chunk = shapes.chunks[0]
    prefill = speed.prefill_seconds(config, dtype, work.prompt_tokens, chunk, shards)
    chunks = -(-work.prompt_tokens // chunk)
    prefill += chunks * speed.draft_seconds(_rereading(shapes, chunk, work.prompt_tokens // 2, rows=1), dtype)
    return tokens_per_second(work, step, candidate.expected_acceptance.accepted_length, B * prefill)


def _rereading(shapes: Shapes, nodes: int, slots: int, rows: int | None = None) -> Cost:
    """Reading the cache and the head once more for each further part of a pass."""
    config, item = shapes.config, jnp.dtype(shapes.dtype).itemsize
    B = shapes.batch if rows is None else rows
    vector = config.head_dim * item
    if shapes.cache_dtype == "int8":
        vector = config.head_dim + 4  # and a scale
    cache = 2 * config.num_layers * B * config.num_kv_heads * slots * vector
    again = 0.0
    if shapes.score_nodes is not None:
        again += (math.ceil(nodes / shapes.score_nodes) - 1) * cache
    if shapes.logit_nodes is not None and rows is None:
        again += (math.ceil(nodes / shapes.logit_nodes) - 1) * config.vocab_size * config.hidden_size * item
    return Cost(bytes=again / shapes.shards)


def _largest_context(plan: MemoryPlan, limit: int) -> int:
    """The most context that fits with the same choice, in steps of `SLOTS`, and never less than it has."""

    def fits(context: int) -> bool:
        return plan.resized(plan.drafter, plan.batch, context).peak_bytes <= limit

    low, high = plan.context, plan.shapes.config.max_context
    while low < high:  # it lies in low..high
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    rounded = low // SLOTS * SLOTS
    return rounded if plan.context < rounded < plan.shapes.config.max_context else low


def _too_small(request: PlanRequest, limit: int, whole_device: bool, nearest: MemoryPlan) -> BudgetError:
    assert nearest.bounds is not None
    shapes = nearest.shapes
    terms = sorted(nearest.terms, key=lambda term: -term.bytes)[:4]
    largest = ", ".join(f"{term.name} {format_bytes(term.bytes)}" for term in terms)
    reserve = f", runtime reserve {format_bytes(nearest.reserve_bytes)}" if nearest.reserve_bytes else ""
    asked = f"{request.device.name} has" if whole_device else "memory_budget"
    least = nearest.bounds.least_budget
    return BudgetError(
        f"{asked} {format_bytes(limit)}, too small for context {shapes.context}, batch {shapes.batch}: "
        f"{largest}{reserve}. "
        f"The nearest plan is {shapes.drafter_name} with T={shapes.tree_nodes}, C={shapes.chunks[0]}; "
        f"{least} bytes ({format_bytes(least)}) would work",
        least_budget=least,
        least_speculative_budget=nearest.bounds.least_speculative_budget,
    )


def _rate(plan: MemoryPlan) -> float:
    assert plan.expected is not None
    return plan.expected.tokens_per_second
