import jax.numpy as jnp
import numpy as np
import pytest
from numpy_heads import Chain, silu

from specmemo_jax.draft.head_config import HeadConfig, HeadKind, default_taps, head_layer
from specmemo_jax.llama.rope import rope_tables
from specmemo_jax.testing import TINY
from specmemo_jax.train import heads
from specmemo_jax.train.loss import sight

F32 = jnp.dtype("float32")
T, H = 9, TINY.hidden_size


def head_of(kind: HeadKind, **fields) -> HeadConfig:
    return HeadConfig(kind, head_layer(TINY), default_taps(kind, TINY), **fields)


def random_params(head: HeadConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        name: 1 + 0.1 * rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1
        else rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-1]))
        for name, shape in head.tensor_shapes().items()
    }


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_step_of_every_depth_equals_drafting_slot_by_slot(kind):
    head = head_of(kind)
    params, rng = random_params(head), np.random.default_rng(2)
    embedded = rng.standard_normal((T, H)).astype(np.float32)
    features = rng.standard_normal((T, len(head.taps) * H)).astype(np.float32)
    on_device = {name: jnp.asarray(array) for name, array in params.items()}
    segments, rotary = jnp.ones((1, T), jnp.int32), rope_tables(TINY, jnp.arange(T, dtype=jnp.int32)[None])
    state, past, outs = heads.first_state(head, on_device, jnp.asarray(features)[None], F32), (), []
    for i in range(4):
        out, own = heads.step(
            head, on_device, jnp.asarray(embedded)[None], state, rotary, sight(segments, i), past, F32
        )
        outs.append(np.asarray(out[0]))
        state, past = heads.shifted(out, 1), (*past, own)
    chain = Chain(head, params)
    for slot in range(T):
        last = chain.read(embedded[slot], features[slot])
        np.testing.assert_allclose(outs[0][slot], last, atol=2e-4)
        draft = chain.fork()
        for i in range(1, min(4, T - slot)):
            last = draft.feed(embedded[slot + i], last)
            np.testing.assert_allclose(outs[i][slot + i], last, atol=2e-4)


def test_medusa_state_is_a_residual_block():
    head = head_of("medusa", num_heads=2)
    params = random_params(head)
    features = np.random.default_rng(3).standard_normal((T, H)).astype(np.float32)
    on_device = {name: jnp.asarray(array) for name, array in params.items()}
    out = heads.medusa_state(on_device, 1, jnp.asarray(features)[None], F32)
    inner = features @ params["1.0.linear.weight"].T + params["1.0.linear.bias"]
    np.testing.assert_allclose(out[0], features + silu(inner), atol=1e-4)


def test_shifted_moves_both_ways():
    x = jnp.arange(4, dtype=jnp.int32)[None]
    assert heads.shifted(x, 1).tolist() == [[0, 0, 1, 2]]
    assert heads.shifted(x, -2).tolist() == [[2, 3, 0, 0]]
