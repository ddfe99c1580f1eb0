"""Forward kernel of the convolutions: one read of the inputs, one write of the outputs.

Bound: 2 D bytes in and 2 D out for each token in bfloat16, and 2 k D more where every token has a kernel of its own.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.causal_conv.mosaic_rows import (
    Operands,
    Plan,
    Window,
    compiler_params,
    sigmoid,
    slide,
    weighted,
)
from pallas_kernels.causal_conv.tiles import Tiles


def forward(given: Operands, *, activation: str | None, tiles: Tiles, name: str) -> Float[Array, "B T D"]:
    """Outputs in the dtype of x, summed in float32; 0 before the bias on padding."""
    pl, plgpu = compat.pl, compat.plgpu
    (B, T, D), dtype = given.x.shape, given.x.dtype
    plan = Plan.of(given.x, given.weight.shape[-2], tiles)
    reach, rows = plan.reach, plan.rows
    dynamic = given.weight.ndim == 4
    x = plan.readable(given.x)
    weight = plan.readable(given.weight) if dynamic else given.weight
    operands = given._replace(x=x, weight=weight, ids=plan.read_ids(given.ids))

    def kernel(refs: Operands, out, tile, kernels, ready):
        b, i, c = (lax.axis_index(axis) for axis in ("row", "block", "column"))
        first, columns = i * rows, pl.ds(c * plan.columns, plan.columns)
        plgpu.copy_gmem_to_smem(refs.x.at[b, pl.ds(first, rows), columns], tile.at[pl.ds(reach, rows)], ready)
        # The first block reads any rows there: what lies before the row counts as padding.
        before = pl.ds(jnp.maximum(first - reach, 0), reach)
        plgpu.copy_gmem_to_smem(refs.x.at[b, before, columns], tile.at[pl.ds(0, reach)], ready)
        if dynamic:
            plgpu.copy_gmem_to_smem(refs.weight.at[b, pl.ds(first, rows), :, columns], kernels, ready)
        weights = None if dynamic else plan.far_rows(refs.weight, columns)
        bias = None if refs.bias is None else plan.far(refs.bias.at[columns])
        plgpu.barrier_wait(ready)

        def advance(r, window):
            s = plan.document(refs.ids, b, first + r - reach)
            taps, window = slide(
                window, plan.shared(tile.at[r]), s, lambda: plan.opening(refs.state, b, s, columns)
            )
            return s, taps, window

        def step(r, window):
            s, taps, window = advance(r, window)
            own = weights
            if own is None:
                own = [plan.shared(kernels.at[r - reach, j]) for j in range(plan.taps)]
            y = weighted(own, taps, bias)
            if dynamic:
                y = jnp.where(s > 0, y, 0.0)
            if activation == "silu":
                y = y * sigmoid(y)
            # Where the input was, which no later token reads again.
            tile[r] = y.astype(dtype)
            return window

        window = Window((plan.zero(),) * reach, jnp.int32(0))
        window = lax.fori_loop(0, reach, lambda r, w: advance(r, w)[2], window)
        lax.fori_loop(reach, reach + rows, step, window, unroll=plan.unroll)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(reach, rows)], out.at[b, pl.ds(first, rows), columns])
        plgpu.wait_smem_to_gmem(0)

    kernels = (rows, plan.taps, plan.columns) if dynamic else (1,)
    out = compat.mosaic_kernel(
        kernel,
        name=name,
        out_type=jax.ShapeDtypeStruct(x.shape, dtype),
        grid=(D // plan.columns, plan.blocks, B),
        grid_names=("column", "block", "row"),
        scratch_types=(
            plgpu.SMEM((reach + rows, plan.columns), dtype),
            plgpu.SMEM(kernels, given.weight.dtype),
            plgpu.Barrier(num_arrivals=3 if dynamic else 2),
        ),
        compiler_params=compiler_params(),
    )(operands)
    return out[:, :T]
