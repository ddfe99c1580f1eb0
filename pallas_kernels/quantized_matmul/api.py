"""Public entry of the quantised matrix product, and its argument checks."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import require, require_operand_dtype, require_shape
from pallas_kernels.quantized_matmul.codes import EIGHT_BITS, GROUPS, QuantizedRows, QuantizedWeight
from pallas_kernels.quantized_matmul.nvfp4 import BLOCK

_FLOATS = ("bfloat16", "float16", "float32")
# So many products of two codes of 8 bits may not fit into 32 bits.
_MOST_INPUTS = 2**31 // 128**2


def _check_nvfp4(w: QuantizedWeight) -> None:
    require(w.bits == 4, "w.bits", w.bits, "4 with w.tensor_scale, which NVFP4 only has")
    kind = w.codes.dtype.name
    require(kind == "uint8", "w.codes.dtype", kind, "uint8, two codes to a byte, see quantize_nvfp4")
    require(w.codes.ndim == 2, "w.codes.shape", w.codes.shape, "two dimensions, outputs first")
    N, K = w.shape
    require(K > 0 and K % BLOCK == 0, "w.codes.shape", w.codes.shape, f"[N, K / 2], K a multiple of {BLOCK}")
    require_shape("w.scale", w.scale, (K // BLOCK, N), f"K / {BLOCK}, N")
    allowed = "float8_e4m3fn with w.tensor_scale (NVFP4)"
    require(w.scale.dtype == jnp.float8_e4m3fn, "w.scale.dtype", w.scale.dtype.name, allowed)
    require(w.offset is None, "w.offset", "an array", "None with w.tensor_scale: NVFP4 is symmetric")
    require_shape("w.tensor_scale", w.tensor_scale, (), "one for all values")
    require(w.tensor_scale.dtype == jnp.float32, "w.tensor_scale.dtype", w.tensor_scale.dtype.name, "float32")


def _check_weight(w: QuantizedWeight) -> None:
    if w.tensor_scale is not None:
        return _check_nvfp4(w)
    require(w.bits in (4, 8), "w.bits", w.bits, "4 or 8")
    wanted = ("uint8",) if w.bits == 4 else EIGHT_BITS
    how = "two codes to a byte, see pack_codes" if w.bits == 4 else "one code a byte"
    allowed = f"{' or '.join(wanted)} with {w.bits} bits, {how}"
    require(w.codes.dtype.name in wanted, "w.codes.dtype", w.codes.dtype.name, allowed)
    require(w.codes.ndim == 2, "w.codes.shape", w.codes.shape, "two dimensions, outputs first")
    require(w.scale.ndim == 2, "w.scale.shape", w.scale.shape, "two dimensions [K / group, N]")
    N, K = w.shape
    groups = w.scale.shape[0]
    allowed = f"[K / group, N] of K = {K} inputs and N = {N} outputs, the group one of {GROUPS} or all K"
    fits = groups > 0 and K % groups == 0 and (groups == 1 or K // groups in GROUPS)
    require(
        fits and w.scale.shape[1] == N, "w.scale.shape", w.scale.shape, f"{allowed}; transpose it if need be"
    )
    allowed = f"one of {_FLOATS}, or float8_e4m3fn of NVFP4 with w.tensor_scale"
    require(w.scale.dtype.name in _FLOATS, "w.scale.dtype", w.scale.dtype.name, allowed)
    if w.offset is not None:
        require_shape("w.offset", w.offset, w.scale.shape, "K / group, N")
        require(w.offset.dtype.name in _FLOATS, "w.offset.dtype", w.offset.dtype.name, f"one of {_FLOATS}")


def _check_rows(x: QuantizedRows, w: QuantizedWeight) -> None:
    kinds = f"{' or '.join(EIGHT_BITS)}; see quantize_rows"
    require(x.codes.dtype.name in EIGHT_BITS, "x.codes.dtype", x.codes.dtype.name, kinds)
    require(x.scale.ndim == 2, "x.scale.shape", x.scale.shape, "two dimensions [M, 1] or [M, K / group]")
    M, groups = x.shape[0], w.scale.shape[0]
    allowed = f"({M}, 1) or ({M}, {groups}), a scale a row or one for each group of the weights"
    require(x.scale.shape in ((M, 1), (M, groups)), "x.scale.shape", x.scale.shape, allowed)
    require(x.scale.dtype == jnp.float32, "x.scale.dtype", x.scale.dtype.name, "float32")
    allowed = f"below {_MOST_INPUTS}, for int32 sums are exact no further; use groups"
    floats = x.codes.dtype != jnp.int8 or w.codes.dtype.name in EIGHT_BITS[1:]
    require(floats or w.group < _MOST_INPUTS, "K / w.scale.shape[0]", w.group, allowed)


def quantized_matmul(
    x: Float[Array, "M K"] | QuantizedRows,
    w: QuantizedWeight,
    *,
    operand_dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "M N"]:
    """``y = x @ W.T`` where W is stored in 4 or 8 bits.

    With float x (W4A16, W8A16, NVFP4) the values of the weights are multiplied. With quantised rows (W8A8, W4A8) the codes are:
    ``y[m, n] = sum_g (sum of products of codes in group g) * (x.scale[m, g] * w.scale[g, n])``, the inner sums exact in
    int32, the scales multiplied in float32 (in float16, as in Atom's kernel, they could underflow). Where either has codes
    of float8 the products are exact and their sums are of float32; within 128 inputs the Hopper kernel's keep about 14 bits.

    Source: Atom (arXiv 2310.19102), sections B and E of its arithmetic, without the outlier channels.

    Differentiable by x, or by the scale of quantised rows, and by scale and offset of the weights; of NVFP4 by
    tensor_scale. Codes have no gradient, float8 or not, nor have the e4m3 scales of NVFP4.

    Args:
        x: rows, or quantised rows, which several products may share.
        w: the weights; groups of 32, 64 or 128 inputs, or one a row; or NVFP4, with float x
            only, whose tensor_scale multiplies the sums in float32.
        operand_dtype: dtype to which x, the values of W and the cotangents are rounded (sums are float32); None keeps
            that of x. Not with quantised rows, whose codes are multiplied.
        out_dtype: dtype of y; None: that of x, or float32 for quantised rows.
        implementation: "auto", "mosaic_gpu", "xla" or "reference".

    Raises:
        ValueError: a shape, a dtype or ``implementation`` is not as above.
    """
    _check_weight(w)
    coded = isinstance(x, QuantizedRows)
    ndim = (x.codes if coded else x).ndim
    require(ndim == 2, "x.shape", x.shape, "two dimensions [M, K]; reshape the leading ones to one")
    require(x.shape[1] == w.shape[1], "x.shape", x.shape, f"K (second) to be {w.shape[1]}, as in w [N, K]")
    require_operand_dtype(operand_dtype)
    if coded:
        kind = None if w.tensor_scale is None else "NVFP4"
        require(kind is None, "w", kind, "weights in 4 or 8 bits without tensor_scale, with quantised rows")
        _check_rows(x, w)
        given = None if operand_dtype is None else jnp.dtype(operand_dtype).name
        require(given is None, "operand_dtype", given, "None with quantised rows, whose codes are multiplied")
    else:
        require(x.dtype.name in _FLOATS, "x.dtype", x.dtype.name, f"one of {_FLOATS}, or QuantizedRows")
    out = jnp.dtype(out_dtype or (jnp.float32 if coded else x.dtype))
    require(out.name in _FLOATS, "out_dtype", out.name, f"None or one of {_FLOATS}")
    options = {"operand_dtype": operand_dtype, "out_dtype": out}
    module = dispatch.choose("quantized_matmul", implementation, x, w, **options)
    return module.run(x, w, **options)
