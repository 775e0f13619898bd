"""Models that need no files, for pytest users."""

import numpy as np

from specmemo_jax.llama.config import LlamaConfig

TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    ffn_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context=256,
)


def tiny_llama(config: LlamaConfig = TINY, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights for ``config``: canonical names to arrays, ready for ``LLM(config, params)``.

    Untied, greedy decoding wanders and repeats itself by turns, which suits tests of drafters.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in config.tensor_shapes().items():
        noise = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("norm.weight"):
            params[name] = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            params[name] = 0.1 * noise
        else:
            params[name] = noise / np.float32(np.sqrt(shape[-1]))
    return params
