"""Matrix products for training: operands in the compute dtype, sums in float32, forward and backward."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specmemo_jax.llama.layers import rms_norm


def _einsum(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )


def _forward(spec: str, a: Array, b: Array, dtype: Any) -> tuple[Array, Any]:
    kinds = jnp.zeros((), a.dtype), jnp.zeros((), b.dtype)
    return _einsum(spec, a, b, dtype), (a.astype(dtype), b.astype(dtype), kinds)


def _backward(spec: str, dtype: Any, kept: Any, cotangent: Array) -> tuple[Array, Array]:
    a, b, (kind_a, kind_b) = kept
    operands, out = spec.split("->")
    of_a, of_b = operands.split(",")
    to_a = _einsum(f"{out},{of_b}->{of_a}", cotangent, b, dtype)
    to_b = _einsum(f"{of_a},{out}->{of_b}", a, cotangent, dtype)
    return to_a.astype(kind_a.dtype), to_b.astype(kind_b.dtype)


_rounded: Any = jax.custom_vjp(_einsum, nondiff_argnums=(0, 3))
_rounded.defvjp(_forward, _backward)


def product(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    """``einsum(spec, a, b)``, float32; both operands are rounded to ``dtype`` first.

    So are cotangents in its gradient: JAX's own would multiply float32 by bfloat16, which no tensor core
    does.
    """
    return _rounded(spec, a, b, dtype)


def linear(x: Float[Array, "*rows I"], weight: Float[Array, "O I"], dtype: Any) -> Float[Array, "*rows O"]:
    """``x W^T``, float32."""
    flat = product("ri,oi->ro", x.reshape(-1, x.shape[-1]), weight, dtype)
    return flat.reshape(*x.shape[:-1], weight.shape[0])


def norm(x: Float[Array, "B T H"], weight: Float[Array, " H"], eps: float) -> Float[Array, "B T H"]:
    """Root-mean-square norm, float32."""
    return rms_norm(x.astype(jnp.float32), weight, eps)


def chunk_size(total: int, most: int) -> int:
    """The largest divisor of ``total`` that is at most ``most``."""
    return next(size for size in range(min(total, most), 0, -1) if total % size == 0)
