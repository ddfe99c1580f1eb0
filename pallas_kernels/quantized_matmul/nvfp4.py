"""NVFP4 weights: 16 inputs share a scale in e4m3, their codes are e2m1, and one float32 scale is the whole tensor's.

``value = e2m1 * e4m3 * tensor_scale``, 4.5 bits a value. The product of the first two has at most 6 significant bits and
lies between 2^-10 and 2688: bfloat16 and float16 hold it exactly, so that only sums round, and the tensor's scale is a
factor of the result.

Source: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), appendix B, in the order of operations of
TransformerEngine; blocks so small that their scale would round to 0 keep the least one, as in Model-Optimizer.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.arguments import require
from pallas_kernels.quantized_matmul.codes import QuantizedWeight

# Inputs that share a scale.
BLOCK = 16
_MOST_CODE, _MOST_SCALE, _LEAST_SCALE = 6.0, 448.0, 2.0**-9
# The tensor's scale stays a normal number: smaller ones become 0 where denormals are flushed.
_MOST_ENCODING = 2.0**126


def e2m1_codes(values: Float[Array, "*rest"]) -> UInt8[Array, "*rest"]:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives as codes 0..15; ties to even, saturated."""
    size = jnp.abs(values)
    # Between neighbours the even code takes the tie: the lower one at the first, third, ... place.
    below = sum((size > at).astype(jnp.uint8) for at in (0.25, 1.25, 2.5, 5.0))
    above = sum((size >= at).astype(jnp.uint8) for at in (0.75, 1.75, 3.5))
    return below + above + jnp.where(jnp.signbit(values), jnp.uint8(8), jnp.uint8(0))


def quantize_nvfp4(w: Float[Array, "N K"]) -> QuantizedWeight:
    """Round weights to NVFP4, the largest magnitude of the tensor to code 6 times scale 448.

    Args:
        w: finite values, K-major: [outputs, inputs], K a multiple of 16.

    Returns:
        codes u8[N, K / 2], scale e4m3[K / 16, N], tensor_scale f32[].

    Raises:
        ValueError: w has other than two dimensions, or K is no multiple of 16.
    """
    require(w.ndim == 2, "w.shape", w.shape, "two dimensions [N, K], outputs first")
    N, K = w.shape
    require(K > 0 and K % BLOCK == 0, "w.shape", w.shape, f"K a multiple of {BLOCK}; pad it with zeros")
    values = w.astype(jnp.float32).reshape(N, K // BLOCK, BLOCK)
    largest = jnp.abs(values).max(axis=2)
    most = largest.max(initial=0.0)
    encode = jnp.where(most > 0, jnp.minimum(_MOST_CODE * _MOST_SCALE / most, _MOST_ENCODING), 1.0)
    tensor_scale = 1 / encode
    # Beyond its largest e4m3 has no number.
    steps = jnp.clip(largest * (encode * (1 / _MOST_CODE)), _LEAST_SCALE, _MOST_SCALE)
    scale = steps.astype(jnp.float8_e4m3fn)
    gain = 1 / (scale.astype(jnp.float32) * tensor_scale)
    codes = e2m1_codes(values * jnp.minimum(gain, jnp.finfo(jnp.float32).max)[..., None]).reshape(N, K)
    return QuantizedWeight(codes[:, 0::2] | (codes[:, 1::2] << 4), scale.T, tensor_scale=tensor_scale)
