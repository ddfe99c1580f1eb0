"""Many LoRA adapters on Hopper GPUs through Mosaic: rows sorted by slot, then a kernel for both products at once.

The gradients of the factors are the weights' gradients of grouped products, with low-rank rows on one side of each.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.common import ROWS
from pallas_kernels.grouped_matmul.mosaic_weights import weights_of_experts
from pallas_kernels.grouped_matmul.tiles import DEPTH
from pallas_kernels.grouped_matmul.visits import visits
from pallas_kernels.segmented_matmul.mosaic_rows import rows_by_adapters
from pallas_kernels.segmented_matmul.xla import by_slot, unsorted

REASON = "both products of a tile of rows in one kernel, for the adapters that have rows only"
BESIDE = (
    "the sort by slot, rows gathered into its order and back, the table of visits, casts of factors that are not bfloat16, "
    "copies of factors of a rank other than 16, 32, 64 or 128; in backward the halves and the scale of the factors' gradients"
)
# The widths that the tensor cores and the copy engine both take.
_RANKS = (16, 32, 64, 128)


def supports(x, a, b, _scaling, _slots, *, operand_dtype, **_options) -> str | None:
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, not {x.dtype.name}"
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.bfloat16:
        return f"operands must be bfloat16, not {jnp.dtype(operand_dtype).name}"
    for name, factor in (("a", a), ("b", b)):
        if factor.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} must be bfloat16 or float32, not {factor.dtype.name}"
    (_, K, r), N = a.shape, b.shape[2]
    if K % DEPTH or N % DEPTH:
        return f"inputs and outputs in multiples of {DEPTH}, not {K} and {N}"
    if r > _RANKS[-1]:
        return f"ranks to {_RANKS[-1]}, not {r}"
    if 0 in (len(x), K, N):
        return "there is nothing to multiply"
    return None


def _factors(a, b, dtype):
    """Both in this dtype, of the next rank that the kernels have."""
    r = a.shape[2]
    more = next(rank for rank in _RANKS if rank >= r) - r
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.pad(a, ((0, 0), (0, 0), (0, more))), jnp.pad(b, ((0, 0), (0, more), (0, 0)))


def _forward(x, a, b, scaling, slots):
    p = by_slot(slots, len(a))
    table = visits(p.sizes, len(x), ROWS)
    rows = x[p.order]
    y, low = rows_by_adapters(rows, *_factors(a, b, x.dtype), scaling, table, transposed=False)
    known = (slots >= 0) & (slots < len(a))
    y = jnp.where(known[:, None], unsorted(y, p, x.dtype), jnp.nan)
    return y, (rows, low, p, table)


@jax.custom_vjp
def _segmented(x, a, b, scaling, slots):
    return _forward(x, a, b, scaling, slots)[0]


def _segmented_fwd(x, a, b, scaling, slots):
    y, kept = _forward(x, a, b, scaling, slots)
    return y, (*kept, a, b, scaling)


def _halves(low, dtype, multiple):
    """[high | rest | zeros] of float32 rows, whose first two add up to them, in a multiple of so many columns."""
    high = low.astype(dtype)
    rest = (low - high.astype(jnp.float32)).astype(dtype)
    return jnp.pad(jnp.concatenate([high, rest], axis=1), ((0, 0), (0, -2 * low.shape[1] % multiple)))


def _segmented_bwd(residuals, g):
    rows, low, p, table, a, b, scaling = residuals
    dtype, r, rank = rows.dtype, a.shape[2], low.shape[1]
    shrink, expand = _factors(a, b, dtype)
    g = g.astype(dtype)[p.order]
    dx, dlow = rows_by_adapters(g, expand, shrink, scaling, table, transposed=True)
    # What stands in rows of nobody is not read below either: these sums are over the rows of slots.
    da = weights_of_experts(rows, _halves(dlow, dtype, 1), p.sizes, jnp.float32)
    db = weights_of_experts(_halves(low, dtype, ROWS), g, p.sizes, jnp.float32)
    da, db = da[:, :, :rank] + da[:, :, rank:], db[:, :rank] + db[:, rank : 2 * rank]
    busy = p.sizes > 0
    scale = jnp.where(busy, scaling.astype(jnp.float32), 0)[:, None, None]
    ends = jnp.cumsum(p.sizes)
    at = jnp.arange(len(rows))
    mine = (at >= (ends - p.sizes)[:, None]) & (at < ends[:, None])
    dscaling = jnp.sum(jnp.where(mine, jnp.sum(low * dlow, axis=1), 0), axis=1)
    pools = (scale * da[:, :, :r]).astype(a.dtype), (scale * db[:, :r]).astype(b.dtype)
    return unsorted(dx, p, dtype), *pools, dscaling.astype(scaling.dtype), None


_segmented.defvjp(_segmented_fwd, _segmented_bwd)


def run(x, a, b, scaling, slots, *, operand_dtype):
    del operand_dtype
    return _segmented(x, a, b, scaling, slots.astype(jnp.int32))
