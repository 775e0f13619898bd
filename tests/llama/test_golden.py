"""Our float32 logits against transformers + torch: committed figures, and live where torch is."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specmemo_jax.llama import kv
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.model import forward, logits
from specmemo_jax.llama.packing import Target, abstract_model, pack
from specmemo_jax.testing import tiny_llama

CASES = json.loads((Path(__file__).parent.parent / "data" / "golden_llama.json").read_text())
ROOT = Path(__file__).parents[2]


@functools.cache
def program(config: LlamaConfig, dtype: str):
    """One chunk through the model, compiled once a shape whatever the weights."""
    graph, tree, _ = abstract_model(config, jnp.dtype(dtype))
    template = Target(config, jnp.dtype(dtype), "cpu", (), graph, tree)

    @jax.jit
    def run(leaves, cache, tokens, starts):
        model = template.merge(leaves)
        T = tokens.shape[1]
        causal = jnp.tril(jnp.ones((1, T, T), bool))
        positions = starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        hidden, new = forward(model, (cache,), tokens, positions, causal, starts)
        cache = kv.write(cache, new, starts, jnp.zeros((1,), jnp.int32), "cpu")
        return cache, logits(model, hidden)[0]

    return run


def our_logits(config: LlamaConfig, params, ids, dtype="float32", chunk=None) -> np.ndarray:
    """Logits of every position, ``chunk`` tokens at a time through the cache."""
    target = pack(config, iter(params.items()), jnp.dtype(dtype))
    chunk = chunk or len(ids)
    shape = (1, config.num_kv_heads, 64, config.head_dim)
    cache = kv.init_cache(config.num_layers, shape, target.dtype)
    rows = []
    for start in range(0, len(ids), chunk):
        tokens = jnp.asarray(ids[start : start + chunk], jnp.int32)[None]
        cache, out = program(config, dtype)(target.leaves, cache, tokens, jnp.full((1,), start, jnp.int32))
        rows.append(np.asarray(out))
    return np.concatenate(rows)


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_logits_equal_transformers(case):
    config = LlamaConfig.from_dict(case["config"])
    ours = our_logits(config, tiny_llama(config, case["seed"]), case["ids"])
    np.testing.assert_allclose(ours[case["rows"]], np.array(case["logits"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked_prefill_changes_nothing(chunk):
    case = CASES[1]
    config = LlamaConfig.from_dict(case["config"])
    params = tiny_llama(config, 3)
    whole = our_logits(config, params, case["ids"])
    np.testing.assert_allclose(our_logits(config, params, case["ids"], chunk=chunk), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision_stays_close(dtype, error):
    case = CASES[1]
    config = LlamaConfig.from_dict(case["config"])
    params = tiny_llama(config, case["seed"])
    half = our_logits(config, params, case["ids"], dtype, chunk=8)
    assert np.abs(half - our_logits(config, params, case["ids"])).max() < error


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.filterwarnings("ignore")
def test_logits_equal_live_transformers():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from make_golden import VARIANTS, torch_logits  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    assert [c["name"] for c in CASES] == list(VARIANTS), "run scripts/make_golden.py again"
    for seed, case in enumerate(CASES, start=50):
        config = LlamaConfig.from_dict(case["config"])
        params = tiny_llama(config, seed)
        theirs = torch_logits(case["config"], params, np.array(case["ids"]))
        np.testing.assert_allclose(our_logits(config, params, case["ids"]), theirs, atol=1e-4, rtol=0)
