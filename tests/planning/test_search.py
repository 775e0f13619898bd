"""The search and its bounds, on made-up requests and the table's devices; nothing is compiled."""

import dataclasses
import itertools
import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmemo_jax.devices.table import find_device
from specmemo_jax.errors import BudgetError, CapacityError, ConfigError
from specmemo_jax.planning.request import Planning, planning_for
from specmemo_jax.planning.search import KEPT_THROUGHPUT, best_within, candidates

SEVEN = "llama-2-7b-chat"


def request(**fields) -> Planning:
    return planning_for(SEVEN, **{"device": "titan-rtx", "context": 2048, **fields})


def expected_of(plan):
    assert plan is not None
    assert plan.expected is not None
    return plan.expected


def bounds_of(plan):
    assert plan.bounds is not None
    return plan.bounds


def planned(planning, budget):
    return dataclasses.replace(planning, budget=budget).plan()


@settings(max_examples=25, deadline=None)
@given(
    model=st.sampled_from(["smollm2-135m-instruct", "llama-3.2-1b-instruct", SEVEN]),
    device=st.sampled_from(["titan-rtx", "a100-80", "mi250-gcd"]),
    drafter=st.sampled_from(["auto", "ngram", "none", "self:1"]),
    batch=st.sampled_from([1, 3, 16]),
    context=st.sampled_from([None, 640, 2048]),
    prompt=st.integers(1, 500),
)
def test_the_least_budget_is_the_least(model, device, drafter, batch, context, prompt):
    planning = planning_for(
        model,
        device=device,
        drafter=drafter,
        batch=batch,
        context=context,
        prompt_tokens=prompt,
        new_tokens=99,
    )
    plans = candidates(planning.request, planning.offered, planning.speed)  # of the least context
    least = min(plan.peak_bytes for plan in plans)
    memory = planning.request.device.memory_bytes
    with pytest.raises(BudgetError, match="would work") as refused:
        planned(planning, least - 1)
    assert refused.value.least_budget == least
    if least <= memory:
        plan = planned(planning, least)
        assert plan.peak_bytes <= least
        assert bounds_of(plan).least_budget == least
        assert plan.context >= planning.request.workload.tokens


def test_the_lower_bound_keeps_the_speed():
    planning = request()
    plans = candidates(planning.request, planning.offered, planning.speed)
    memory = planning.request.device.memory_bytes
    best, bounds = best_within(plans, memory), bounds_of(planning.plan())
    at, under = best_within(plans, bounds.lower_bound), best_within(plans, bounds.lower_bound - 1)
    assert expected_of(at).tokens_per_second >= KEPT_THROUGHPUT * expected_of(best).tokens_per_second
    assert (
        under is None
        or expected_of(under).tokens_per_second < KEPT_THROUGHPUT * expected_of(best).tokens_per_second
    )
    assert bounds.least_speculative_budget is not None
    assert bounds.least_budget <= bounds.least_speculative_budget <= bounds.lower_bound <= memory


def test_a_smaller_budget_gives_a_smaller_plan_of_the_same_context():
    planning = request()
    large, small = planning.plan(), planned(planning, bounds_of(planning.plan()).least_budget)
    assert small.peak_bytes < large.peak_bytes
    assert small.context == large.context == 2048
    assert expected_of(small).tokens_per_second <= expected_of(large).tokens_per_second
    assert expected_of(large).tokens_per_second > expected_of(large).vanilla_tokens_per_second


def test_an_open_context_is_the_largest_that_fits():
    planning = request(context=None, prompt_tokens=100, new_tokens=100)
    plans = candidates(planning.request, planning.offered, planning.speed)
    budget = min(plan.peak_bytes for plan in plans) + 2**28
    plan = planned(planning, budget)
    assert plan.peak_bytes <= budget
    assert 200 < plan.context < 4096
    wider = dataclasses.replace(
        planning, request=dataclasses.replace(planning.request, workload=dataclasses.replace(
            planning.request.workload, context=plan.context + 128))
    )  # fmt: skip
    choices = operator.attrgetter("shapes.chunks", "shapes.score_nodes", "shapes.logit_nodes")
    options = [option for option in planning.offered if option.drafter == plan.drafter]
    fits = [
        p for p in candidates(wider.request, options, wider.speed)
        if choices(p) == choices(plan) and p.peak_bytes <= budget
    ]  # fmt: skip
    assert not fits


@settings(max_examples=25, deadline=None)
@given(
    model=st.sampled_from(["smollm2-135m-instruct", "llama-3.2-1b-instruct", SEVEN]),
    device=st.sampled_from(["titan-rtx", "rtx-4090", "t4", "a100-80", "h100", "mi250-gcd"]),
    drafter=st.sampled_from(["auto", "ngram", "none", "self:2"]),
    batch=st.sampled_from([None, 1, 2, 4, 10, 32]),
    share=st.floats(0.4, 1),
    prompt=st.sampled_from([None, 30, 500]),
)
def test_plan_with_an_open_context_is_the_plan_for_the_one_it_chose(
    model, device, drafter, batch, share, prompt
):
    budget = int(find_device(device).memory_bytes * share)
    fields = {"device": device, "drafter": drafter, "prompt_tokens": prompt, "memory_budget": budget}
    open_ = planning_for(model, batch=batch, **fields)
    try:
        chosen = open_.plan()
    except BudgetError:
        return
    work = open_.request.workload
    fields |= {"prompt_tokens": work.prompt_tokens, "new_tokens": work.new_tokens}
    told = planning_for(model, batch=chosen.batch, context=chosen.context, **fields)
    same = told.plan()
    if batch is None:
        same = dataclasses.replace(same, bounds=chosen.bounds)  # which tell the most rows, too
    assert chosen == same
    assert [plan.expected for plan in open_.frontier()] == [plan.expected for plan in told.frontier()]
    best = [plan for plan in told.frontier() if plan.peak_bytes <= budget][-1]
    assert (best.peak_bytes, best.expected) == (chosen.peak_bytes, chosen.expected)


def test_plan_of_four_rows_on_an_rtx_4090_has_one_speed():
    open_, told = (
        planning_for(SEVEN, device="rtx-4090", batch=4, context=context).plan() for context in (None, 4096)
    )
    assert open_ == told
    assert open_.context == 4096


def test_the_frontier_rises():
    plans = request().frontier()
    assert len(plans) > 2
    for less, more in itertools.pairwise(plans):
        assert less.peak_bytes < more.peak_bytes
        assert expected_of(less).tokens_per_second < expected_of(more).tokens_per_second


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"memory_budget": "1000GiB"}, BudgetError, "more than NVIDIA TITAN RTX has"),
        ({"memory_budget": "1GiB"}, BudgetError, "target weights 12.55 GiB"),
        ({"memory_budget": 0}, ConfigError, "positive"),
        ({"memory_budget": "12 potatoes"}, ConfigError, "12 potatoes"),
        ({"device": "abacus"}, ConfigError, "titan-rtx"),
        ({"context": 5000}, CapacityError, "4096"),
        ({"batch": 0}, ConfigError, "batch must be at least 1"),
        ({"prompt_tokens": 2000, "new_tokens": 100}, ConfigError, "2100"),
        ({"context": None, "prompt_tokens": 4000, "new_tokens": 1000}, CapacityError, "4096"),
        ({"shards": 3}, ConfigError, "evenly"),
        ({"dtype": "bfloat16"}, ConfigError, "float16"),
        ({"policy": "greedy"}, ConfigError, "policy"),
        ({"drafter": "llama-3.2-1b-instruct"}, ConfigError, "vocabulary"),
    ],
)
def test_what_cannot_be(fields, error, message):
    with pytest.raises(error, match=message):
        request(**fields).plan()


def test_where_the_figures_came_from():
    plan = request().plan()
    assert "roofline estimate" in expected_of(plan).speed_source
    assert "borrowed" in expected_of(plan).acceptance_source
    draft = request(drafter="vicuna-7b-v1.3", device="a100-80").plan()
    assert "assumed" in expected_of(draft).acceptance_source


def test_shards_split_what_is_the_targets():
    whole = planning_for("llama-2-70b-chat", device="h200", context=4096, batch=4, drafter="none").plan()
    part = planning_for(
        "llama-2-70b-chat", device="mi250-gcd", context=4096, batch=4, shards=8, drafter="none"
    ).plan()
    assert part.weights_bytes == pytest.approx(whole.weights_bytes / 8, rel=0.001)
    kv = [next(b.bytes for b in plan.buffers if b.name == "target KV") for plan in (whole, part)]
    assert kv[1] * 8 == kv[0]
