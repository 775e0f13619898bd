import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmemo_jax.llama import kv
from specmemo_jax.llama.attention import TILE, tree_attention

HEADS, KV_HEADS, D, ROWS, NODES = 4, 2, 8, 3, 5


def filled_cache(rng, slots, dtype, slots_last):
    """A layer's keys and values of `ROWS` rows, every slot of them written."""
    cache = kv.init_cache(1, (ROWS, KV_HEADS, slots, D), jnp.dtype(dtype), slots_last)
    heads = [jnp.asarray(rng.standard_normal((ROWS, KV_HEADS, slots, D)), jnp.float32) for _ in range(2)]
    keys, values = map(kv.quantize, heads) if dtype == "int8" else heads
    nowhere = jnp.zeros((ROWS,), jnp.int32)
    return kv.write(cache, ((keys, values),), nowhere, jnp.arange(ROWS), "cpu")[0]


@functools.partial(jax.jit, static_argnames=("dtype",))
def attend(q, k, v, cache, seen, lengths, dtype, row=None):
    if row is not None:
        cache = kv.row_tiles(cache, row, TILE, q)
    return tree_attention(q, k, v, cache, seen, lengths, dtype, None)


@pytest.mark.parametrize(
    ("dtype", "slots_last"), [("float32", True), ("float32", False), ("bfloat16", False), ("int8", False)]
)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_attention_in_tiles_reads_what_the_whole_cache_s_reads(dtype, slots_last, data):
    slots = data.draw(st.sampled_from([64, 320, 512]))
    length = data.draw(st.one_of(st.integers(0, slots), st.sampled_from([0, 1, 255, 256, 257])).filter(
        lambda length: length <= slots
    ))  # fmt: skip
    rng, row = np.random.default_rng(length), data.draw(st.integers(0, ROWS - 1))
    cache = filled_cache(rng, slots, dtype, slots_last)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, *shape)), jnp.float32)
        for shape in ((NODES, HEADS, D), (KV_HEADS, NODES, D), (KV_HEADS, NODES, D))
    )
    seen, lengths = jnp.tril(jnp.ones((1, NODES, NODES), bool)), jnp.array([length])
    own = jax.tree.map(lambda x: x[row : row + 1], cache)
    product = jnp.dtype("float32" if dtype == "int8" else dtype)
    whole = attend(q, k, v, own, seen, lengths, product)
    tiled = attend(q, k, v, cache, seen, lengths, product, jnp.int32(row))
    near = 2e-2 if dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(np.asarray(tiled), np.asarray(whole), atol=near, rtol=near)
    other = jax.tree.map(lambda x: x.at[(row + 1) % ROWS].set(jnp.ones((), x.dtype)), cache)
    np.testing.assert_array_equal(attend(q, k, v, other, seen, lengths, product, jnp.int32(row)), tiled)
