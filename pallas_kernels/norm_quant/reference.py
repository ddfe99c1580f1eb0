"""RMSNorm, then rounding, row by row in float32: the two ops that this one stands for."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul.codes import QuantizedRows, quantize_rows

REASON = "the oracle of the tests: norm and rounding one after the other, row by row"


def supports(*_args, **_options) -> str | None:
    return None


def added(x: Float[Array, "*rows K"], residual: Float[Array, "*rows K"] | None) -> Float[Array, "*rows K"]:
    """The sum, rounded to the dtype of x: which XLA may leave out where a cast back to float32 follows."""
    if residual is None:
        return x
    info = jnp.finfo(x.dtype)
    total = x.astype(jnp.float32) + residual.astype(jnp.float32)
    return jax.lax.reduce_precision(total, info.nexp, info.nmant).astype(x.dtype)


def run(x, weight, *, residual, eps, group, clip, code_dtype):
    def one(row):
        total = added(*row)
        u = total.astype(jnp.float32)
        y = u * jax.lax.rsqrt(jnp.mean(u * u) + eps) * weight.astype(jnp.float32)
        found = quantize_rows(y[None], group=group, clip=clip, code_dtype=code_dtype)
        return found.codes[0], found.scale[0], total

    codes, scale, total = jax.lax.map(one, (x, residual))
    return QuantizedRows(codes, scale), None if residual is None else total
