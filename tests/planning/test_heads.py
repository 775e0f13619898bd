"""Heads of the zoo among what the planner may choose."""

import pytest

from specmemo_jax.draft.head_files import heads_for
from specmemo_jax.errors import ConfigError
from specmemo_jax.planning.request import planning_for, stored_profile

MODEL, HEAD = "smollm2-135m-instruct", "smollm2-135m-eagle"


def offered(model: str, **settings) -> set[str]:
    planning = planning_for(model, context=1024, **settings)
    return {"none" if c.drafter is None else c.drafter.name for c in planning.offered}


def test_auto_offers_the_head_of_the_default_model():
    assert heads_for(MODEL) == (HEAD,)
    assert offered(MODEL, device="a100-40") == {"none", "ngram", f"eagle3 {HEAD}"}


def test_auto_offers_no_head_of_another_model():
    assert offered("llama-2-7b-chat", device="a100-40") == {"none", "ngram"}


def test_a_head_by_name_is_planned_for_with_a_measured_profile():
    plan = planning_for(MODEL, device="a100-40", drafter=HEAD, context=1024).plan()
    profile = stored_profile(MODEL, f"eagle3 {HEAD}")
    assert plan.shapes.drafter_name == f"eagle3 {HEAD}"
    assert profile is not None
    assert plan.expected is not None
    assert profile.source in plan.expected.acceptance_source
    assert plan.expected.accepted_length > 2


def test_a_head_of_another_target_is_refused():
    with pytest.raises(ConfigError, match=f"{HEAD} cannot draft for this target"):
        planning_for("llama-2-7b-chat", device="a100-40", drafter=HEAD)


def test_a_head_that_is_known_by_its_config_is_planned_for():
    plan = planning_for(
        "llama-2-7b-chat", device="a100-40", drafter="eagle-llama2-chat-7b", context=2048
    ).plan()
    weights = next(buffer for buffer in plan.footprint.persistent if buffer.name == "draft weights")
    assert weights.bytes > 400 * 2**20
    assert plan.footprint.persistent[0].bytes > 10 * weights.bytes
