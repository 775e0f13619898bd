"""Matrix products, however many rows they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmemo_jax.llama.layers import matmul
from specmemo_jax.llama.tiles import WHOLE_UP_TO, tiled_rows


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_products_of_any_number_of_rows(dtype, near):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((24, 16)), dtype)
    product = jax.jit(matmul, static_argnums=2)
    for rows in (1, 2, 3, 5, 7, 9, 10, 16, 26):
        x = jnp.asarray(rng.standard_normal((2, rows, 16)), "float32")
        want = np.asarray(x.astype(dtype), "float32") @ np.asarray(weight, "float32").T
        got = product(x, weight, "cpu")
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=near, atol=near)


def test_rows_are_filled_up_to_whole_tiles_and_never_doubled():
    for rows in range(1, 200):
        tiled = tiled_rows(rows)
        assert rows <= tiled < 2 * rows
        assert tiled == rows or (rows <= WHOLE_UP_TO and tiled.bit_count() == 1)
    assert [tiled_rows(rows) for rows in (4, 5, 8, 10, 16, 20, 28, 40, 60)] == [
        4,
        8,
        8,
        16,
        16,
        20,
        32,
        40,
        64,
    ]
