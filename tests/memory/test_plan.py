import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.devices.table import find_device
from specmemo_jax.draft import DraftModel, NgramDrafter, SelfDrafter, TreeShape
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.programs import Programs, state_shardings
from specmemo_jax.errors import CapacityError, ConfigError
from specmemo_jax.files.byte_size import parse_bytes
from specmemo_jax.llama.packing import abstract_target, pack
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.planning.prove import compile_target_for, programs_for
from specmemo_jax.testing import TINY, tiny_llama

F32 = jnp.dtype("float32")


SMALL = dataclasses.replace(TINY, num_layers=1, hidden_size=16, ffn_size=24, num_heads=2, num_kv_heads=1)
DRAFT = pack(SMALL, iter(tiny_llama(SMALL).items()), jnp.dtype("bfloat16"))
DRAFTERS = {
    "none": None,
    "ngram": NgramDrafter(16),
    "ladder": NgramDrafter(8, ladder=((4, 1), (8, 2)), min_hit_rate=0.35),
    "draft model": DraftModel.of(DRAFT, TreeShape(8, 3, 3)),
    "self": SelfDrafter(1, TreeShape(6, 2, 3)),
}


@pytest.mark.parametrize(
    ("name", "batch", "dtype", "kv_dtype"),
    [
        ("none", 1, "float32", None),
        ("none", 1, "bfloat16", None),
        ("ngram", 1, "float32", None),
        ("ngram", 3, "bfloat16", None),
        ("ngram", 1, "float32", "int8"),
        ("self", 3, "bfloat16", "int8"),
        ("ladder", 1, "float32", None),
        ("draft model", 1, "float32", None),
        ("draft model", 3, "bfloat16", None),
        ("self", 3, "float32", None),
    ],
)
def test_plan_against_the_compiler(name, batch, dtype, kv_dtype):
    """Persistent buffers to the byte, temporaries from above, the whole state aliased, sampled or greedy."""
    drafter = DRAFTERS[name]
    target = pack(TINY, iter(tiny_llama().items()), jnp.dtype(dtype))
    plan = lay_out(
        Shapes(
            TINY,
            dtype=target.dtype.name,
            platform="cpu",
            batch=batch,
            context=TINY.max_context,
            drafter=drafter,
            kv_dtype=kv_dtype,
        )
    )
    engine = Engine(target, plan)
    largest = plan.shapes.capacities[-1]
    state = engine.programs.abstract_state(largest)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    draft_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.draft_weights))
    assert target.num_bytes == plan.weights_bytes
    assert sum(b.bytes for b in plan.buffers) == target.num_bytes + draft_bytes + state_bytes
    assert sum(term.bytes for term in plan.terms) == plan.peak_bytes
    for sampled in (False, True):
        programs = [
            engine.step_program(largest, sampled),
            engine.prefill_program(largest, plan.shapes.chunks[0], sampled),
        ]
        for program in programs:
            figures = compiled_memory(program)
            assert figures.aliased >= state_bytes
            assert figures.peak <= plan.peak_bytes


def test_a_mesh_holds_its_share_of_the_vocabulary():
    """The tokens seen are split by vocabulary, as the logits are; what the programs need is in the plan."""
    config = dataclasses.replace(TINY, vocab_size=2**17, hidden_size=32, num_heads=8, num_kv_heads=8)
    drafter, batch = NgramDrafter(4), 4
    plan = lay_out(
        Shapes(config, dtype="float32", platform="cpu", batch=batch, context=200, drafter=drafter, shards=8)
    )
    programs = programs_for(plan, compile_target_for(find_device("cpu"), "float32", 8))
    state = programs.abstract_state(plan.shapes.capacities[-1])
    assert programs.mesh is not None
    kept = [
        place.shard_shape(leaf.shape)
        for place, leaf in zip(
            jax.tree.leaves(state_shardings(programs.mesh, state)), jax.tree.leaves(state), strict=True
        )
    ]
    assert 4 * sum(map(math.prod, kept)) == pytest.approx(
        sum(buffer.bytes for buffer in plan.buffers) - plan.weights_bytes, abs=256
    )
    assert (batch, 2**14) in kept
    for lower in (
        programs.prefill(plan.shapes.capacities[-1], 128, True),
        programs.step(plan.shapes.capacities[-1], True),
    ):
        figures = compiled_memory(programs.compile(lower))
        assert figures.extra <= plan.footprint.largest.bytes


def test_shapes_are_the_plans():
    cpu = lay_out(Shapes(TINY, dtype=F32.name, platform="cpu", context=200, drafter=NgramDrafter(8)))
    assert cpu.shapes.capacities == (256,)
    assert cpu.tree_nodes == 8
    assert Shapes(TINY, dtype=F32.name, platform="gpu", context=256).capacities == (320,)
    assert "target KV" in cpu.table()
    assert cpu.generation_bytes == cpu.peak_bytes - cpu.weights_bytes


def test_contexts_and_batches_that_cannot_be():
    with pytest.raises(CapacityError, match="512 exceeds the model's 256"):
        Shapes(TINY, dtype=F32.name, platform="cpu", context=512)
    with pytest.raises(ConfigError, match="max_batch"):
        Shapes(TINY, dtype=F32.name, platform="cpu", context=256, batch=0)
    with pytest.raises(ConfigError, match="max_context"):
        Shapes(TINY, dtype=F32.name, platform="cpu", context=0)


@given(st.integers(1, 2**40))
def test_sizes_read_back(size):
    assert parse_bytes(size) == parse_bytes(str(size)) == parse_bytes(f" {size} B ") == size


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 2**30), ("1.5 MiB", 3 * 2**19), ("2kb", 2000), ("3GB", 3 * 10**9)]
)
def test_sizes_with_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["12 potatoes", "", "-1", "0", 0, -5, "1e9", "GiB", True])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="memory size"):
        parse_bytes(text)


@pytest.mark.parametrize("score_nodes", [None, 32])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_holds_no_cache_of_all_layers_at_once(dtype, batch, score_nodes):
    """A layer's row may be copied while it is read; the rows of all layers, or whole layers, are never."""

    def temporaries(layers):
        config = dataclasses.replace(TINY, num_layers=layers, max_context=2048)
        shapes = Shapes(config, dtype, "cpu", 2000, batch, score_nodes=score_nodes)
        programs = Programs(abstract_target(config, jnp.dtype(dtype), "cpu"), shapes)
        return compiled_memory(programs.compile(programs.prefill(2048, 128))).temporaries

    vector = 2 * TINY.num_kv_heads * TINY.head_dim
    row = 2048 * vector * jnp.dtype(dtype).itemsize
    waiting = 128 * (TINY.num_heads * TINY.head_dim + vector) * 4  # a layer's new keys, values, and queries
    assert temporaries(8) - temporaries(2) < 6 * (waiting + row // 4)
