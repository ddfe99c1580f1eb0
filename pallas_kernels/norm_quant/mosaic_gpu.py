"""RMSNorm and rounding on Hopper GPUs through Mosaic: a row is read once and written once."""

from functools import partial
from typing import Any

import jax

from pallas_kernels.norm_quant import xla
from pallas_kernels.norm_quant.mosaic_kernel import SHARED_BYTES, WIDTH, Plan, launch
from pallas_kernels.norm_quant.tiles import Tiles
from pallas_kernels.quantized_matmul.codes import QuantizedRows
from pallas_kernels.tiles import tiles

REASON = "a row is read once and leaves in 8 bits, and with a residual as the new one"
BESIDE = "a slice of the scales of groups, where inputs are no multiple of 1024; gradients"

# So many rows fill the device several times over, and one warpgroup takes several.
_MANY = 1024
_MOST = 16384


def supports(x, weight, *, residual, group, **_options) -> str | None:
    M, K = x.shape
    if M < 1:
        return "there are no rows"
    if K % WIDTH or K > _MOST:
        return f"K = {K} is not a multiple of {WIDTH} up to {_MOST}"
    arrays = 1 + (residual is not None)
    needed = Plan.of(K, group, Tiles()).shared_bytes(x.dtype.itemsize, weight.dtype.itemsize, arrays, 1)
    if needed > SHARED_BYTES:
        return f"a row takes {needed} bytes of shared memory, of {SHARED_BYTES}"
    return None


def _launched(x, weight, residual, options):
    M, K = x.shape
    eps, group, clip, code_dtype = options
    many = M >= _MANY
    default = Tiles(4, 2) if many else Tiles()
    key = f"K{K} {x.dtype.name} {'many' if many else 'few'}"
    codes, scale, total = launch(
        x,
        weight,
        residual,
        eps=eps,
        group=group,
        clip=clip,
        code_dtype=code_dtype,
        tiles=tiles("norm_quant", key, default),
    )
    return codes, scale[:, : 1 if group is None else K // group], total


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _quantised(x, weight, residual, options):
    return _launched(x, weight, residual, options)


def _fwd(x, weight, residual, options):
    return _launched(x, weight, residual, options), (x, weight, residual)


def _bwd(options, kept, cotangents):
    eps, group, clip, code_dtype = options
    _, dscale, dtotal = cotangents

    def through_xla(x, weight, residual):
        rows, total = xla.run(
            x, weight, residual=residual, eps=eps, group=group, clip=clip, code_dtype=code_dtype
        )
        return rows.scale, total

    return jax.vjp(through_xla, *kept)[1]((dscale, dtotal))


_quantised.defvjp(_fwd, _bwd)


def run(x, weight, *, residual, eps, group, clip, code_dtype):
    found: Any = _quantised(x, weight, residual, (eps, group, clip, code_dtype))
    codes, scale, total = found
    return QuantizedRows(codes, scale), total
