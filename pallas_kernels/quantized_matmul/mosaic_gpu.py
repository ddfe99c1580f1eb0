"""Weights in 4 bits times bfloat16 rows on Hopper; the kernel leaves sums of shares, transposed, that XLA adds up."""

import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.quantized_matmul import mosaic_kernel, xla
from pallas_kernels.quantized_matmul.codes import QuantizedRows, QuantizedWeight
from pallas_kernels.quantized_matmul.mosaic_kernel import HIGH, OUTPUTS, Tiles

REASON = "codes by TMA and warpgroup matrix products on Hopper, split over the inputs"
BESIDE = "even and odd inputs of x apart and its sums by group, the sum of the shares and their transposition"

# The 16 bytes of 32 codes are less than the least swizzle of shared memory.
_GROUPS = (64, 128)
# Columns of the result that a program has: rows of x, which are few in decode.
_COLUMNS = (32, 64, 128)
_MULTIPROCESSORS = 132


def supports(x, w: QuantizedWeight, *, operand_dtype, **_options) -> str | None:
    if isinstance(x, QuantizedRows):
        return "products of codes with codes have no kernel yet, xla multiplies them"
    if w.bits != 4:
        return "weights in 8 bits, int8 or float8, have no kernel yet, xla multiplies them"
    for name, dtype in (("x", x.dtype), ("operands", operand_dtype or x.dtype)):
        if dtype != jnp.bfloat16:
            return f"{name} must be bfloat16, not {jnp.dtype(dtype).name}"
    if w.group not in _GROUPS:
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
    columns = columns_of(M)
    blocks = -(-M // columns)
    x = jnp.pad(x, ((0, blocks * columns - M), (0, 0)))
    # A power of two: nothing is rounded.
    halves = jnp.stack([x[:, 0::2], x[:, 1::2] * (1 / HIGH)])
    sums = x.astype(jnp.float32).reshape(blocks, columns, K // group, group).sum(axis=3)
    config = tiles.tiles("quantized_matmul", f"4 bits group{group} M{columns}", Tiles())
    shares = mosaic_kernel.launch(
        *(halves, jnp.swapaxes(sums, 1, 2), w.codes, w.scale, w.offset),
        config=config,
        splits=splits_of(config.splits, N // OUTPUTS * blocks, K // group),
    )
    return shares.sum(axis=0)[:, :M].T.astype(out_dtype)


def run(x, w, *, operand_dtype, out_dtype):
    del operand_dtype
    return xla.differentiable(
        product, x, w.codes, w.scale, w.offset, w.bits, jnp.dtype(jnp.bfloat16), out_dtype
    )
