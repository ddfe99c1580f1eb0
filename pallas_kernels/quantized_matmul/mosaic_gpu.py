"""Weights in 4 bits, NVFP4 among them, times bfloat16 or coded rows, and codes of 8 bits times codes of 8 bits, on Hopper.

Of few rows the kernels leave sums of shares, transposed, that XLA adds up.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tiles
from pallas_kernels.quantized_matmul import mosaic_codes, mosaic_kernel, mosaic_packed, xla
from pallas_kernels.quantized_matmul.codes import QuantizedRows, QuantizedWeight
from pallas_kernels.quantized_matmul.mosaic_kernel import HIGH, OUTPUTS, Tiles

REASON = "codes by TMA and warpgroup matrix products on Hopper, of few rows split over the inputs"
BESIDE = (
    "of 4 bits: even and odd inputs of x apart, its sums by group where they are floats, and the transposition of the "
    "result; of few rows the sum of the shares and their transposition; the gradients"
)

# The 16 bytes of 32 codes are less than the least swizzle of shared memory.
_GROUPS = (64, 128)
# Columns of the result that a program has: rows of x, which are few in decode.
_COLUMNS = (32, 64, 128)
_MULTIPROCESSORS = 132


def _supports_packed(x: QuantizedRows, w: QuantizedWeight) -> str | None:
    if x.codes.dtype != jnp.int8:
        return f"weights in 4 bits have a kernel with rows of int8 only, not {x.codes.dtype.name}"
    if w.offset is not None:
        return "weights in 4 bits without offsets, with rows in 8 bits"
    if w.group != mosaic_packed.GROUP:
        return (
            f"groups of {mosaic_packed.GROUP} inputs with rows in 8 bits, not {w.group}, which xla multiplies"
        )
    if w.shape[0] % OUTPUTS:
        return f"outputs in multiples of {OUTPUTS}, not {w.shape[0]}"
    return "there is nothing to multiply" if 0 in (*x.shape, w.shape[0]) else None


def _supports_codes(x: QuantizedRows, w: QuantizedWeight) -> str | None:
    if w.bits == 4:
        return _supports_packed(x, w)
    kinds = (x.codes.dtype.name, w.codes.dtype.name)
    if kinds[0] != kinds[1]:
        return f"codes of rows and weights of one dtype, not {kinds[0]} and {kinds[1]}"
    if w.offset is not None:
        return "weights in 8 bits without offsets"
    N, K = w.shape
    if K % mosaic_codes.DEPTHS[-1] or N % 64:
        return f"inputs in multiples of 32 and outputs of 64, which the copy engine lays out, not {K} and {N}"
    return "there is nothing to multiply" if 0 in (*x.shape, N) else None


def supports(x, w: QuantizedWeight, *, operand_dtype, **_options) -> str | None:
    if isinstance(x, QuantizedRows):
        return _supports_codes(x, w)
    if w.bits != 4:
        return "weights in 8 bits have a kernel with rows in 8 bits only, xla multiplies them"
    for name, dtype in (("x", x.dtype), ("operands", operand_dtype or x.dtype)):
        if dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, not {jnp.dtype(dtype).name}"
    if w.tensor_scale is not None:
        if w.shape[1] % _GROUPS[0]:
            return f"inputs of NVFP4 in multiples of {_GROUPS[0]}, not {w.shape[1]}"
    elif w.group not in _GROUPS:
        return f"groups of 64 or 128 inputs, not {w.group}"
    if w.shape[0] % OUTPUTS:
        return f"outputs in multiples of {OUTPUTS}, not {w.shape[0]}"
    if 0 in x.shape:
        return "there is nothing to multiply"
    return None


def columns_of(rows: int) -> int:
    """Columns of a tile of the result: no more than hold the rows."""
    return next((c for c in _COLUMNS if rows <= c), _COLUMNS[-1])


def splits_of(asked: int, programs: int, groups: int) -> int:
    """Shares of the inputs, none of them empty: as asked, or (0) as many as fill the device twice."""
    wanted = min(asked or max(1, -(-2 * _MULTIPROCESSORS // programs)), groups)
    return -(-groups // -(-groups // wanted))


def product(x, w: QuantizedWeight, _dtype, out_dtype):
    """``x @ W.T``; x is bfloat16."""
    (M, K), (N, _), group = x.shape, w.shape, w.group
    nvfp4 = w.tensor_scale is not None
    if nvfp4:
        group = next(size for size in reversed(_GROUPS) if K % size == 0)
    columns = columns_of(M)
    blocks = -(-M // columns)
    x = jnp.pad(x, ((0, blocks * columns - M), (0, 0)))
    # A power of two: nothing is rounded.
    halves = jnp.stack([x[:, 0::2], x[:, 1::2] * (1 if nvfp4 else 1 / HIGH)])
    sums = jnp.zeros((blocks, columns, K // group))
    if not nvfp4:
        sums = x.astype(jnp.float32).reshape(*sums.shape, group).sum(axis=3)
    scale = lax.bitcast_convert_type(w.scale, jnp.uint8) if nvfp4 else w.scale
    kind = "nvfp4" if nvfp4 else "4 bits"
    config = tiles.tiles("quantized_matmul", f"{kind} group{group} M{columns}", Tiles())
    shares = mosaic_kernel.launch(
        *(halves, jnp.swapaxes(sums, 1, 2), w.codes, scale, w.offset),
        config=config,
        splits=splits_of(config.splits, N // OUTPUTS * blocks, K // group),
    )
    return xla.scaled(shares.sum(axis=0)[:, :M].T, w).astype(out_dtype)


def _of_packed(x, x_scale, codes, scale, out_dtype):
    """``x @ W.T`` of rows of codes and weights in 4 bits."""
    (M, _), N, groups = x.shape, codes.shape[0], scale.shape[0]
    columns = columns_of(M)
    blocks = -(-M // columns)
    fill = ((0, blocks * columns - M), (0, 0))
    x = jnp.pad(x, fill)
    own = jnp.pad(x_scale, fill).T if x_scale.shape[1] > 1 or groups == 1 else None
    config = tiles.tiles("quantized_matmul", f"4 by 8 bits M{columns}", Tiles())
    shares = mosaic_packed.launch(
        *(jnp.stack([x[:, 0::2], x[:, 1::2]]), own, codes, scale),
        columns=columns,
        stages=config.stages,
        splits=splits_of(config.splits, N // OUTPUTS * blocks, groups),
    )
    y = shares.sum(axis=0)[:, :M].T
    return (y if own is not None else y * x_scale).astype(out_dtype)


def _of_codes(x, x_scale, codes, scale, out_dtype):
    """``x @ W.T`` of codes of 8 bits: the many rows left, so that few rows make the kernel's result the transposed one."""
    (M, K), (N, _), x_scale = x.shape, codes.shape, x_scale.T
    groups = scale.shape[0]
    turned = M <= mosaic_codes.LEFT
    config = tiles.tiles("quantized_matmul", f"{x.dtype.name} codes {'few' if turned else 'many'}", Tiles())
    if turned:
        columns = columns_of(M)
        steps = K // mosaic_codes.depth_of(K, groups)
        splits = splits_of(config.splits, -(-N // mosaic_codes.LEFT), steps)
        operands = (codes, x, scale, x_scale)
    else:
        # Wide tiles read less, where there are enough of them for the device.
        wide = M * N >= _MULTIPROCESSORS * mosaic_codes.LEFT * 256
        columns = 256 if wide and not mosaic_codes.apart(x.dtype, groups) else 128
        splits, operands = 1, (x, codes, x_scale, scale)
    y = mosaic_codes.launch(
        *operands, columns=columns, splits=splits, stages=config.stages, out_dtype=out_dtype
    )
    y = y[0] if splits == 1 else y.sum(axis=0)
    y = (y.T if turned else y)[:M, :N]
    if splits > 1 and groups == 1:
        y = y.astype(jnp.float32) * (x_scale[0][:, None] * scale[0].astype(jnp.float32))
    return y.astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def product_of_codes(x, x_scale, codes, scale, bits, out_dtype):
    """The product of rows of codes with weights of ``bits``; its gradients by the scales are XLA's."""
    return (_of_packed if bits == 4 else _of_codes)(x, x_scale, codes, scale, out_dtype)


def _fwd(x, x_scale, codes, scale, bits, out_dtype):
    return product_of_codes(x, x_scale, codes, scale, bits, out_dtype), (x, x_scale, codes, scale)


def _bwd(bits, out_dtype, residuals, g):
    x, x_scale, codes, scale = residuals

    def through_xla(x_scale, scale):
        w = QuantizedWeight(codes, scale, None, bits)
        return xla.codes_by_codes(QuantizedRows(x, x_scale), w, out_dtype)

    dx_scale, dscale = jax.vjp(through_xla, x_scale, scale)[1](g)
    return None, dx_scale, None, dscale


product_of_codes.defvjp(_fwd, _bwd)


def run(x, w, *, operand_dtype, out_dtype):
    del operand_dtype
    if isinstance(x, QuantizedRows):
        return product_of_codes(x.codes, x.scale, w.codes, w.scale, w.bits, out_dtype)
    return xla.differentiable(
        product, x, w.codes, w.scale, w.offset, w.tensor_scale, w.bits, jnp.dtype(jnp.bfloat16), out_dtype
    )
