"""The two layers a Llama is made of, with weights as Hugging Face stores them: linear ``[out, in]``."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import optimization_barrier
from jaxtyping import Array, Float

from specmemo_jax.llama.tiles import tiled_rows


@jax.named_scope("norms")
def rms_norm(x: Float[Array, "*rows H"], weight: Float[Array, " H"], eps: float) -> Float[Array, "*rows H"]:
    """Root-mean-square norm (arXiv 1910.07467) in float32, whatever the weight's dtype."""
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weight.shape)


def matmul(x: Float[Array, "B T I"], weight: Float[Array, "O I"], platform: str) -> Float[Array, "B T O"]:
    """``x @ weight.T`` with float32 result, in the form that a platform's compiler runs at memory speed.

    ``x`` is cast to the weight's dtype first. On CPU, XLA only finds its fast
    kernels for some spellings; docs/performance-log.md has the measurements:
    reduced precision wants at least two rows and a float32 result (else every call
    converts the weights), float32 wants the weights on the left, whole tiles of rows and nothing fused in.
    """
    B, T, _ = x.shape
    rows = x.reshape(B * T, -1).astype(weight.dtype)
    if platform != "cpu":
        out = jnp.einsum(
            "rk,nk->rn", rows, weight, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
    elif weight.dtype == jnp.float32:
        padded = jnp.pad(rows, ((0, tiled_rows(B * T) - B * T), (0, 0)))
        out = optimization_barrier(jnp.einsum("nk,rk->nr", weight, optimization_barrier(padded))).T
        out = out[: B * T]
    else:
        padded = jnp.pad(rows, ((0, max(0, 2 - B * T)), (0, 0)))
        out = jnp.einsum(
            "rk,nk->rn", optimization_barrier(padded), weight, preferred_element_type=jnp.float32
        )
        out = optimization_barrier(out)[: B * T]
    return out.reshape(B, T, -1)


class Linear(nnx.Module):
    """``y = x W^T + b`` with ``W`` of shape ``[out, in]``; float32 result.

    ``axes`` names the logical axes of ``W``, kept as metadata for sharding; ``platform`` is what it is
    compiled for (`matmul`).
    """

    def __init__(
        self,
        out_size: int,
        in_size: int,
        dtype: jnp.dtype,
        axes: tuple[str, str],
        bias: bool = False,
        platform: str = "cpu",
    ):
        self.platform = platform
        self.weight = nnx.Param(jnp.zeros((out_size, in_size), dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_size,), dtype), axes=axes[:1]) if bias else None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """`matmul` with the weight, plus the bias."""
        with jax.named_scope("products"):
            y = matmul(x, self.weight[...], self.platform)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)[None, None]


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight ``[H]``."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((size,), dtype), axes=("hidden",))
        self.eps = eps

    def __call__(self, x: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
        """Norm over the last axis, float32."""
        return rms_norm(x, self.weight[...], self.eps)
