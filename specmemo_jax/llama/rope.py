"""Rotary position embeddings (Su et al., arXiv 2104.09864), half-split as Hugging Face stores them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specmemo_jax.llama.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angular frequencies ``[D/2]`` in radians a position, float32, scaling applied.

    ``llama3`` follows Llama 3.1: wavelengths beyond ``original_context / low_freq_factor``
    are stretched by ``factor``, those under ``original_context / high_freq_factor`` kept,
    and the band between blended linearly in frequency.
    """
    D = config.head_dim
    exponents = np.arange(0, D, 2, dtype=np.float32) / np.float32(D)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind != "llama3":
        return frequencies
    assert scaling.original_context is not None
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((scaling.original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)


@jax.named_scope("rope")
def rope_tables(
    config: LlamaConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """``cos`` and signed ``sin`` for `rotate`, float32; the first half of ``sin`` carries the minus."""
    angles = (
        positions.astype(jnp.float32)[:, :, None] * jnp.asarray(inverse_frequencies(config))[None, None, :]
    )
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


@jax.named_scope("rope")
def rotate(
    x: Float[Array, "B T N D"], cos: Float[Array, "B T D"], sin: Float[Array, "B T D"]
) -> Float[Array, "B T N D"]:
    """Turn every head's vector by its position's angles; computed in the dtype of ``x`` (float32 here)."""
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    swapped = jax.lax.rev(halves, (halves.ndim - 2,)).reshape(x.shape)
    return x * cos[:, :, None, :] + swapped * sin[:, :, None, :]
