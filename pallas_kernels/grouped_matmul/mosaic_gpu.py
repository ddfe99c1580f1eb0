"""The grouped product on Hopper GPUs through Mosaic: a table of visits, and a kernel each for rows and for weights."""

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.grouped_matmul.mosaic_rows import rows_by_experts
from pallas_kernels.grouped_matmul.mosaic_weights import weights_of_experts
from pallas_kernels.grouped_matmul.tiles import DEPTH, Tiles
from pallas_kernels.grouped_matmul.visits import visits

REASON = "tiles of rows times their own experts' weights, read by TMA for the experts that have rows only"
BESIDE = (
    "the table of visits (cumulative sums and gathers of integers), casts of weights that are not bfloat16"
)


def supports(x, w, _sizes, *, operand_dtype, **_options) -> str | None:
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, not {x.dtype.name}"
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.bfloat16:
        return f"operands must be bfloat16, not {jnp.dtype(operand_dtype).name}"
    if w.dtype not in (jnp.bfloat16, jnp.float32):
        return f"weights must be bfloat16 or float32, not {w.dtype.name}"
    if w.shape[1] % DEPTH or w.shape[2] % DEPTH:
        return f"inputs and outputs in multiples of {DEPTH}, not {w.shape[1]} and {w.shape[2]}"
    if 0 in x.shape or 0 in w.shape:
        return "there is nothing to multiply"
    return None


def _rows(x, w, sizes, transposed: bool):
    M, (E, K, N) = x.shape[0], w.shape
    outputs = K if transposed else N
    asked = tiles.tiles("grouped_matmul", f"rows{Tiles().chosen(M, outputs, E).rows}", Tiles())
    config = asked.chosen(M, outputs, E)
    table = visits(sizes, M, config.rows)
    return rows_by_experts(x, w.astype(x.dtype), table, transposed=transposed, config=config)


@jax.custom_vjp
def _grouped(x, w, sizes):
    return _rows(x, w, sizes, False)


def _grouped_fwd(x, w, sizes):
    return _rows(x, w, sizes, False), (x, w, sizes)


def _grouped_bwd(residuals, g):
    x, w, sizes = residuals
    return _rows(g, w, sizes, True), weights_of_experts(x, g, sizes, w.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def run(x, w, sizes, *, operand_dtype):
    del operand_dtype
    return _grouped(x, w, sizes.astype(jnp.int32))
