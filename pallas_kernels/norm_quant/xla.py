"""RMSNorm and rounding of whole arrays: XLA fuses what it can, and no order of the steps was found to be faster on a CPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.norm_quant.reference import added
from pallas_kernels.quantized_matmul.codes import quantize_rows

REASON = "norm and rounding as one program, fused by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, weight, *, residual, eps, group, clip, code_dtype):
    total = added(x, residual)
    wide = total.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=1, keepdims=True) + eps)
    rows = quantize_rows(y * weight.astype(jnp.float32), group=group, clip=clip, code_dtype=code_dtype)
    return rows, None if residual is None else total
