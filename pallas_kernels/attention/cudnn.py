"""Attention through cuDNN, for the calls that it computes exactly.

Visibility here is (segment, position), which only arrays know; cuDNN's own causal and packed modes go by row index. So
the mask is always written out and given as such. Source: ``jax.nn.dot_product_attention(implementation="cudnn")``.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import Marks, visible
from pallas_kernels.attention.options import Options

REASON = "cuDNN's fused attention, with the visible keys as a mask"
BESIDE = "the mask, written out"

# Elements of the mask, which cuDNN reads as a bias of two bytes each.
MOST_MASK = 2**28


def supports(q, k, v, _marks: Marks, options: Options) -> str | None:
    (B, T, _, d), S = q.shape, k.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return f"it takes bfloat16 or float16, the same for all, not {q.dtype}, {k.dtype} and {v.dtype}"
    if options.operand_dtype is not None and jnp.dtype(options.operand_dtype) != q.dtype:
        return f"it multiplies in {q.dtype}, not in operand_dtype={jnp.dtype(options.operand_dtype).name}"
    if options.kv_layout != "BTKD":
        return f"it reads keys as [B, S, K, d], not kv_layout={options.kv_layout!r}"
    if d % 8 or d > 128:
        return f"it takes head sizes that are multiples of 8 up to 128, not {d}"
    if options.soft_cap is not None:
        return "it has no soft cap"
    if options.return_lse:
        return "its log-sum-exp is rounded and has no gradient"
    if T % 2 or S % 2:
        return f"its backward pass takes even lengths, not {T} queries and {S} keys"
    if T == 1 or B * T * S > MOST_MASK:
        return f"its mask of {B} x {T} x {S} would cost more than it saves"
    return None


def run(q, k, v, marks: Marks, options: Options):
    seen = visible(marks, options.window)
    out = jax.nn.dot_product_attention(
        q, k, v, mask=seen[:, None], scale=options.scale, implementation="cudnn"
    )
    # Where nothing is visible cuDNN gives the mean of everything.
    return jnp.where(jnp.any(seen, axis=-1)[..., None, None], out, 0), None
