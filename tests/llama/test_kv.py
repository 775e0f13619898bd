import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.llama import kv

write = jax.jit(kv.write, static_argnames="platform")


def pair(make):
    """``(make(), make())``: keys and values."""
    return make(), make()


@settings(max_examples=15, deadline=None)
@given(
    starts=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    platform=st.sampled_from(["cpu", "gpu"]),
    slots_last=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_row_is_written_at_its_own_start(starts, dtype, platform, slots_last, seed):
    rng = np.random.default_rng(seed)
    shape, T = (3, 2, 16, 4), 4
    before = pair(lambda: jnp.asarray(rng.standard_normal(shape), dtype))
    new = pair(lambda: jnp.asarray(rng.standard_normal((3, 2, T, 4)), jnp.float32))
    cache = (kv.SlotsLast(before[0].swapaxes(2, 3)) if slots_last else before[0], before[1])
    after = write((cache,), (new,), jnp.asarray(starts, jnp.int32), jnp.arange(3), platform=platform)[0]
    for got, old, add in zip(map(kv.plain, after), before, new, strict=True):
        want = np.asarray(old).copy()
        for b, start in enumerate(starts):
            want[b, :, start : start + T] = np.asarray(add[b].astype(dtype))
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("slots_last", [False, True])
def test_one_row_of_many(slots_last):
    cache = kv.init_cache(1, (3, 2, 8, 4), jnp.dtype("float32"), slots_last)
    ones = jnp.ones((1, 2, 2, 4))
    for side in kv.write(cache, ((ones, 2 * ones),), jnp.array([5]), jnp.array([1]), "cpu")[0]:
        k = kv.plain(side)
        assert float(k.sum()) == float(k[1, :, 5:7].sum()) == 16 * float(k.max())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1e-20, 1.0, 1e4]))
def test_quantized_vectors(seed, scale):
    x = scale * np.random.default_rng(seed).standard_normal((2, 3, 5, 8)).astype(np.float32)
    once = kv.quantize(jnp.asarray(x))
    back = np.asarray(kv.plain(once))
    steps = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(back - x) <= steps / 2 * 1.001).all()
    again = kv.quantize(jnp.asarray(back))  # what is stored once more does not wander
    np.testing.assert_array_equal(np.asarray(again.values), np.asarray(once.values))
    np.testing.assert_allclose(np.asarray(again.scales), np.asarray(once.scales), rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_an_int8_cache_is_written_and_grown(platform):
    cache = kv.init_cache(2, (2, 2, 8, 4), jnp.dtype("int8"))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 3, 4)), jnp.float32)
    new = ((kv.quantize(x), kv.quantize(-x)),) * 2
    written = write(cache, new, jnp.array([1, 4]), jnp.arange(2), platform=platform)
    grown = kv.grow((written,), kv.Groups.of(2, 16))
    assert kv.capacity_of(grown) == 16
    for keys, values in grown[0]:
        for sign, side in ((1, keys), (-1, values)):
            got = np.asarray(kv.plain(side))
            for row, start in enumerate((1, 4)):
                np.testing.assert_allclose(
                    got[row, :, start : start + 3], sign * np.asarray(x[row]), atol=0.02
                )
                assert not got[row, :, :start].any()
                assert not got[row, :, start + 3 :].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_donated_write_copies_nothing(dtype, batch):
    shape, slots_last = (batch, 2, 512, 64), kv.keys_slots_last(jnp.dtype(dtype), "cpu")
    cache = jax.eval_shape(lambda: kv.init_cache(2, shape, jnp.dtype(dtype), slots_last))
    one = jax.ShapeDtypeStruct((batch, 2, 8, 64), jnp.float32)
    new = ((jax.eval_shape(kv.quantize, one) if dtype == "int8" else one,) * 2,) * 2
    starts = jax.ShapeDtypeStruct((batch,), jnp.int32)
    donating = jax.jit(functools.partial(kv.write, platform="cpu"), donate_argnums=0)
    memory = compiled_memory(donating.lower(cache, new, starts, starts).compile())
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.aliased >= cache_bytes
    assert memory.temporaries < cache_bytes // 16


@pytest.mark.parametrize("slots_last", [False, True])
def test_grow_keeps_what_is_there(slots_last):
    cache = kv.init_cache(2, (1, 2, 4, 2), jnp.dtype("float32"), slots_last)
    ones = jnp.ones((1, 2, 3, 2))
    cache = kv.write(cache, ((ones, ones),) * 2, jnp.array([0]), jnp.array([0]), "cpu")
    old = jax.tree.leaves(cache)
    grown = kv.grow((cache,), kv.Groups.of(1, 10))
    for side in (side for pair in grown[0] for side in pair):
        leaf = kv.plain(side)
        assert leaf.shape == (1, 2, 10, 2)
        assert float(leaf.sum()) == float(leaf[:, :, :3].sum()) == 12
    assert all(leaf.is_deleted() for leaf in old)
