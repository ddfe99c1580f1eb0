"""The quantised product as what it stands for: every value in float32, then one product."""

import jax.numpy as jnp

from pallas_kernels.quantized_matmul.codes import QuantizedRows, dequantize_rows, dequantize_weight

REASON = "the oracle of the tests: all values in float32"


def supports(_x, _w, *, operand_dtype, **_options) -> str | None:
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.float32:
        return f"it computes in float32, not with operand_dtype={jnp.dtype(operand_dtype).name}"
    return None


def run(x, w, *, operand_dtype, out_dtype):
    del operand_dtype
    rows = dequantize_rows(x) if isinstance(x, QuantizedRows) else x.astype(jnp.float32)
    return jnp.einsum("mk,nk->mn", rows, dequantize_weight(w), precision="highest").astype(out_dtype)
