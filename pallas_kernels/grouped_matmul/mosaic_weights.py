"""The Hopper kernel of the weights' gradient: per expert the product of its rows of x and of the cotangents.

A warpgroup has 64 inputs and some outputs of an expert in float32 registers, and goes down the tiles that hold its rows.
In the first and the last of them rows of others are set to zero, in both operands: NaN times zero is NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels import compat, mosaic
from pallas_kernels.attention.common import ROWS, compiler_params, full, matrices, rows_of

COLUMNS = 128
STAGES = 3


def weights_of_experts(
    x: BFloat16[Array, "M K"], g: BFloat16[Array, "M N"], sizes: Int[Array, " E"], dtype: Any
) -> Float[Array, "E K N"]:
    """``sum_m x[m]^T g[m]`` over the rows of each expert; zeros where it has none."""
    pl, plgpu = compat.pl, compat.plgpu
    (_, K), N, E = x.shape, g.shape[1], sizes.shape[0]
    blocks = -(-N // COLUMNS)
    x, g = rows_of(x, 0, ROWS), rows_of(rows_of(g, 0, ROWS), 1, COLUMNS)
    end = jnp.cumsum(sizes)
    extents = jnp.stack([end - sizes, end], axis=1).astype(jnp.int32)
    layout = plgpu.Layout.WGMMA

    def body(x_ref, g_ref, extents_ref, out_ref, x_s, g_s, out_s, ready):
        expert, row, column = (lax.axis_index(name) for name in ("expert", "input", "output"))
        first, end = extents_ref[expert, 0], extents_ref[expert, 1]
        began = lax.div(first, jnp.int32(ROWS))
        count = jnp.where(first < end, lax.div(end - 1, jnp.int32(ROWS)) - began + 1, 0)
        inputs, outputs = pl.ds(row * ROWS, ROWS), pl.ds(column * COLUMNS, COLUMNS)

        def fetch(n):
            stage = lax.rem(n, jnp.int32(STAGES))
            rows = pl.ds((began + n) * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(x_ref.at[rows, inputs], x_s.at[stage], ready.at[stage])
            plgpu.copy_gmem_to_smem(g_ref.at[rows, outputs], g_s.at[stage], ready.at[stage])

        @pl.loop(0, jnp.minimum(count, STAGES))
        def _first(n):
            fetch(n)

        def step(n, total):
            stage, base = lax.rem(n, jnp.int32(STAGES)), (began + n) * ROWS
            plgpu.barrier_wait(ready.at[stage])

            @pl.when((base < first) | (base + ROWS > end))
            def _others():
                for held in (x_s, g_s):
                    block = mosaic.load(held.at[stage], layout)
                    at = base + mosaic.iota(block.shape, 0, layout)
                    held[stage] = jnp.where((at >= first) & (at < end), block, jnp.zeros_like(block))
                plgpu.commit_smem()

            total = mosaic.mma(total, x_s.at[stage], g_s.at[stage], transpose_a=True)
            # Nothing is written again before every warp has multiplied with it.
            plgpu.commit_smem()
            pl.when(n + STAGES < count)(lambda: fetch(n + STAGES))
            return total

        total = lax.fori_loop(0, count, step, full((ROWS, COLUMNS), 0.0, layout))
        out_s[...] = total.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out_ref.at[expert, inputs, outputs])
        plgpu.wait_smem_to_gmem(0)

    run = compat.mosaic_kernel(
        body,
        name="grouped_matmul_weights",
        out_type=jax.ShapeDtypeStruct((E, K, blocks * COLUMNS if compat.interpreting() else N), dtype),
        scratch_types=(
            matrices((STAGES, ROWS, ROWS), x.dtype),
            matrices((STAGES, ROWS, COLUMNS), g.dtype),
            matrices((ROWS, COLUMNS), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ),
        grid=(E, K // ROWS, blocks),
        grid_names=("expert", "input", "output"),
        compiler_params=compiler_params(),
    )
    return run(x, g, extents)[:, :, :N]
