import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from some_calibration import some_calibration

from specmemo_jax.checkpoints.zoo import zoo_config
from specmemo_jax.devices.table import DEVICES
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.buffers import Cost
from specmemo_jax.memory.workload import Workload
from specmemo_jax.planning.calibration import PrefillPoint, StepPoint
from specmemo_jax.planning.speed import calibrated, pass_cost, roofline, tokens_per_second
from specmemo_jax.testing import TINY

SEVEN = zoo_config("llama-2-7b-chat")
STEPS = tuple(
    StepPoint(batch, nodes, capacity, seconds)
    for batch, nodes, capacity, seconds in [
        (1, 1, 256, 0.010),
        (1, 2, 256, 0.009),  # noise: no faster than one node
        (1, 8, 256, 0.014),
        (1, 1, 1024, 0.013),
        (1, 8, 1024, 0.018),
        (4, 1, 256, 0.015),
        (4, 2, 256, 0.018),
    ]
)
MEASURED = calibrated(
    some_calibration(steps=STEPS, prefills=(PrefillPoint(32, 256, 0.02), PrefillPoint(128, 256, 0.05)))
)


def test_a_pass_reads_every_weight_but_the_embedding_once():
    work = pass_cost(SEVEN, "float16", 1, 1, 0, 1)
    weights = 2 * (SEVEN.num_params - SEVEN.vocab_size * SEVEN.hidden_size)
    assert weights < work.bytes < 1.02 * weights
    assert work.flops == pytest.approx(weights, rel=0.01)
    longer = pass_cost(SEVEN, "float16", 1, 1, 1000, 1)
    cache = 2 * 2 * SEVEN.num_layers * SEVEN.num_kv_heads * SEVEN.head_dim * 1000
    assert cache < longer.bytes - work.bytes < 1.1 * cache
    split = pass_cost(SEVEN, "float16", 1, 1, 0, 1, shards=8)
    assert work.bytes / 8 < split.bytes < work.bytes / 7


def test_roofline_knows_what_binds():
    card = DEVICES["a100-80"]
    speed = roofline(card)
    assert speed.source == "roofline estimate from the data sheet of a100-80"
    one = speed.step_seconds(SEVEN, "float16", 1, 1, 512)
    assert one > pass_cost(SEVEN, "float16", 1, 1, 512, 1).bytes / card.bandwidth
    assert speed.step_seconds(SEVEN, "float16", 1, 16, 512) < 1.2 * one  # free where memory binds
    many = speed.step_seconds(SEVEN, "float16", 64, 64, 512)
    assert many > pass_cost(SEVEN, "float16", 64, 64, 512, 4096).flops / card.flops["float16"]
    eight = speed.step_seconds(SEVEN, "float16", 1, 1, 512, shards=8)
    assert one / 8 < eight < one
    assert speed.prefill_seconds(SEVEN, "float16", 1000, 128) > speed.prefill_seconds(
        SEVEN, "float16", 1000, 512
    )
    assert speed.draft_seconds(Cost(), "float16") == 0
    assert speed.draft_seconds(Cost(4, 1e9, 1e9), "float16") > 1e9 / card.bandwidth
    with pytest.raises(ConfigError, match="no rate for bfloat16; float16, float32 would work"):
        roofline(DEVICES["t4"]).step_seconds(SEVEN, "bfloat16", 1, 1, 512)


@given(st.sampled_from(sorted(DEVICES)), *[st.integers(1, 4096)] * 2, st.integers(1, 64), st.integers(1, 16))
def test_more_work_takes_no_less_time(slug, length, more, nodes, batch):
    device = DEVICES[slug]
    for speed, config, dtype in (
        (roofline(device), SEVEN, device.dtypes[0]),
        (MEASURED, TINY, "float32"),
    ):
        least = speed.step_seconds(config, dtype, batch, nodes, length)
        assert 0 < least <= speed.step_seconds(config, dtype, batch, nodes, length + more)
        assert least <= speed.step_seconds(config, dtype, batch, nodes + 1, length)
        assert least <= speed.step_seconds(config, dtype, batch + 1, nodes, length)


def test_calibrated_goes_through_what_was_measured():
    def step(batch, nodes, length):
        return MEASURED.step_seconds(TINY, "float32", batch, nodes, length)

    assert MEASURED.source == "calibrated on Some CPU, 2026-01-31"
    assert step(1, 1, 256) == step(1, 2, 256) == pytest.approx(0.010)
    assert step(1, 5, 256) == pytest.approx(0.012)
    assert step(1, 1, 1024) == pytest.approx(0.013, rel=0.15)
    assert step(1, 8, 1024) == pytest.approx(0.018, rel=0.15)
    assert step(4, 2, 256) == pytest.approx(0.018, rel=0.15)
    assert MEASURED.beyond(1, 8, 1024) == ""
    assert step(1, 80, 256) > 2 * step(1, 8, 256)
    assert "80 rows a pass, measured to 8" in MEASURED.beyond(1, 80, 256)
    assert "2048 slots, measured to 1024" in MEASURED.beyond(1, 1, 2048)
    prefill = MEASURED.prefill_seconds(TINY, "float32", 300, 128)
    assert prefill == pytest.approx(3 * 0.05)
    assert MEASURED.prefill_seconds(TINY, "float32", 300, 256) > 2 * 0.05


def test_calibrated_drafting():
    assert MEASURED.draft_seconds(Cost(3, 10.0, 20.0), "float32") == pytest.approx(5e-4)
    assert MEASURED.draft_seconds(Cost(3, 10.0, 1e9), "float32") > 5e-4
    assert MEASURED.draft_seconds(Cost(9, 0.0, 2e9), "float32") > 2.0  # not measured: from the rates


def test_calibrated_answers_for_what_was_measured_only():
    for config, dtype, shards in ((SEVEN, "float32", 1), (TINY, "bfloat16", 1), (TINY, "float32", 2)):
        with pytest.raises(ConfigError, match="a roofline estimate, would work"):
            MEASURED.step_seconds(config, dtype, 1, 1, 256, shards)


def test_tokens_a_second_over_prefill_and_steps():
    workload = Workload(batch=2, prompt_tokens=10, new_tokens=101)
    assert tokens_per_second(workload, 0.01, 2.0, 0.5) == pytest.approx(202 / (0.5 + 50 * 0.01))
    assert tokens_per_second(dataclasses.replace(workload, new_tokens=1), 0.01, 2.0, 0.5) == 4
