"""Programs of a plan, made ahead; and kernels that cannot be tried on a full GPU."""

import jax
import jax.numpy as jnp
import pytest

import specmemo_jax.llm as front_door
from specmemo_jax import LLM, SamplingParams
from specmemo_jax.draft import NgramDrafter
from specmemo_jax.engine.program_cache import ProgramCache, plan_keys
from specmemo_jax.engine.programs import Programs, tuning_bytes
from specmemo_jax.llama.packing import abstract_target
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.testing import TINY, tiny_llama

FLOAT32 = jnp.dtype("float32")


def programs_on(platform):
    drafter = NgramDrafter(4)
    plan = lay_out(Shapes(TINY, dtype=FLOAT32.name, platform=platform, batch=2, context=100, drafter=drafter))
    return Programs(abstract_target(TINY, FLOAT32, platform), plan.shapes)


COMPILED = object.__new__(jax.stages.Compiled)


class Lowered(jax.stages.Lowered):
    """A program whose compiler fails while it tries kernels."""

    def __init__(self, failure):
        self.failure, self.asked = failure, []

    def compile(self, compiler_options=None, **_):
        self.asked.append(compiler_options)
        if "xla_gpu_autotune_level" not in (compiler_options or {}):
            raise self.failure
        return COMPILED


FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16.00MiB")


def test_a_full_gpu_compiles_without_trying_kernels():
    lowered = Lowered(FULL)
    assert programs_on("gpu").compile(lowered) is COMPILED
    first, second = lowered.asked
    assert second == {**first, "xla_gpu_autotune_level": "0"}


@pytest.mark.parametrize(
    ("platform", "failure"), [("gpu", jax.errors.JaxRuntimeError("INTERNAL: bug")), ("cpu", FULL)]
)
def test_other_failures_are_told(platform, failure):
    lowered = Lowered(failure)
    with pytest.raises(jax.errors.JaxRuntimeError, match=str(failure)[:8]):
        programs_on(platform).compile(lowered)
    assert len(lowered.asked) == 1


def test_nothing_is_compiled_later(monkeypatch):
    """All that greedy and sampled requests and drafters that sleep ask for is among the plan's programs."""
    made = []
    compile_one = Programs.compile
    monkeypatch.setattr(Programs, "compile", lambda *a: made.append(a) or compile_one(*a))
    cache = ProgramCache(programs_on("cpu"))
    cache.fill()
    filled = len(list(plan_keys(programs_on("cpu")))) + 1  # and the empty state
    assert len(made) == filled
    with LLM(
        TINY, tiny_llama(), drafter=NgramDrafter(4), dtype="float32", max_context=100, max_batch=2
    ) as llm:
        assert len(llm.plan.shapes.capacities) == 1
        llm.engine.runner.programs = cache
        llm.generate([[1, 2, 3] * 5] * 3, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        llm.generate([[1, 2, 3] * 5] * 3, SamplingParams(seed=1, max_tokens=60, ignore_eos=True))
        llm.engine.close()
    assert len(made) == filled


@pytest.mark.parametrize("room", [0, 2**40])
def test_programs_come_before_the_weights_where_a_pool_holds_the_plan_alone(monkeypatch, room):
    events, pack = [], front_door.pack
    monkeypatch.setattr(front_door, "check_allocator", lambda needed, devices: needed + room)
    monkeypatch.setattr(front_door, "pack", lambda *a: events.append("weights") or pack(*a))
    monkeypatch.setattr(ProgramCache, "fill", lambda self: events.append("programs"))
    LLM(TINY, tiny_llama(), drafter=None, dtype="float32", max_context=100).close()
    assert events == (["weights"] if room else ["programs", "weights"])


def test_trying_kernels_takes_the_largest_matrix_at_least():
    target = abstract_target(TINY, FLOAT32, "gpu")
    assert tuning_bytes(target) > max(leaf.size * 4 for leaf in target.leaves)
