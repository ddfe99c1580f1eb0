"""The Hopper kernel of rows times both factors of their adapters, or times both transposed in the other order.

A CTA has one visit: a tile of 64 rows and one adapter with rows in it. The low-rank rows stay in its registers: two
bfloat16 each, a rounded value and what the rounding lost, so that the second product has 16 bits of them. They are written
too, for the gradients of the factors.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels import compat, mosaic
from pallas_kernels.attention.common import ROWS, compiler_params, full, matrices, rows_of
from pallas_kernels.grouped_matmul.tiles import DEPTH
from pallas_kernels.grouped_matmul.visits import END, EXPERT, FIRST, TILE

# Of the wide result, at a time.
COLUMNS = 128
# Float32 columns that make rows of 128 bytes.
_LINE = 32


def rows_by_adapters(
    x: BFloat16[Array, "M I"],
    shrink: BFloat16[Array, "S a b"],
    expand: BFloat16[Array, "S c d"],
    scaling: Float[Array, " S"],
    table: Int[Array, "V 4"],
    *,
    transposed: bool,
) -> tuple[BFloat16[Array, "M O"], Float[Array, "M r"]]:
    """``y[m] = scaling[s] * low[m] @ expand[s]`` of ``low[m] = x[m] @ shrink[s]``, and ``low``; any bits for rows of nobody.

    Args:
        shrink: [S, I, r], or ``transposed`` [S, r, I].
        expand: [S, r, O], or ``transposed`` [S, O, r].
        table: visits of tiles of 64 rows; the rows of nobody are those of expert S.
    """
    pl, plgpu = compat.pl, compat.plgpu
    M, inputs = x.shape
    S, rank = shrink.shape[0], shrink.shape[1 if transposed else 2]
    outputs = expand.shape[1 if transposed else 2]
    blocks, steps = -(-outputs // COLUMNS), inputs // DEPTH
    line = max(rank, _LINE)
    # As many steps in flight as leave room for the second factor.
    stages, ahead = (6, 3) if rank <= 64 else (4, 2)
    x = rows_of(x, 0, ROWS)
    expand = rows_of(expand, 1 if transposed else 2, COLUMNS)
    layout = plgpu.Layout.WGMMA

    def body(
        x_ref,
        shrink_ref,
        expand_ref,
        scaling_ref,
        table_ref,
        y_ref,
        low_ref,
        x_s,
        a_s,
        b_s,
        y_s,
        low_s,
        *ready,
    ):
        visit = lax.axis_index("visit")
        tile, slot, first, end = (table_ref[visit, n] for n in (TILE, EXPERT, FIRST, END))
        busy = (slot < S) & (first < end)
        slot = jnp.minimum(slot, S - 1)
        end = jnp.where(busy, end, first)
        narrow, wide = (jnp.where(busy, jnp.int32(n), 0) for n in (steps, blocks))
        base = tile * ROWS

        def fetch_inputs(n):
            stage, depth = lax.rem(n, jnp.int32(stages)), pl.ds(n * DEPTH, DEPTH)
            block = shrink_ref.at[slot, :, depth] if transposed else shrink_ref.at[slot, depth]
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(base, ROWS), depth], x_s.at[stage], ready[0].at[stage])
            plgpu.copy_gmem_to_smem(block, a_s.at[stage], ready[0].at[stage])

        def fetch_outputs(n):
            stage, own = lax.rem(n, jnp.int32(ahead)), pl.ds(n * COLUMNS, COLUMNS)
            block = expand_ref.at[slot, own] if transposed else expand_ref.at[slot, :, own]
            plgpu.copy_gmem_to_smem(block, b_s.at[stage], ready[1].at[stage])

        pl.loop(0, jnp.minimum(narrow, stages))(fetch_inputs)
        pl.loop(0, jnp.minimum(wide, ahead))(fetch_outputs)

        def down(n, total):
            stage = lax.rem(n, jnp.int32(stages))
            plgpu.barrier_wait(ready[0].at[stage])
            total = mosaic.mma(total, x_s.at[stage], a_s.at[stage], transpose_b=transposed)
            # Nothing is written again before every warp has multiplied with it.
            plgpu.commit_smem()
            pl.when(n + stages < narrow)(lambda: fetch_inputs(n + stages))
            return total

        low = lax.fori_loop(0, narrow, down, full((ROWS, rank), 0.0, layout))
        mosaic.store(low_s.at[:, pl.ds(0, rank)], low, optimized=False)
        plgpu.commit_smem()
        mosaic.write_rows(low_s, lambda rows: low_ref.at[rows], base, first, end)
        scale = scaling_ref[slot]
        high = low.astype(x.dtype)
        rest = (low - high.astype(jnp.float32)).astype(x.dtype)

        @pl.loop(0, wide)
        def _up(n):
            stage = lax.rem(n, jnp.int32(ahead))
            plgpu.barrier_wait(ready[1].at[stage])
            total = mosaic.mma(None, rest, b_s.at[stage], transpose_b=transposed)
            total = mosaic.mma(total, high, b_s.at[stage], transpose_b=transposed)
            plgpu.wait_smem_to_gmem(0)
            # Banks conflict in rows that are not tiled.
            mosaic.store(y_s, (total * scale).astype(x.dtype), optimized=False)
            plgpu.commit_smem()
            pl.when(n + ahead < wide)(lambda: fetch_outputs(n + ahead))
            own = pl.ds(n * COLUMNS, COLUMNS)
            mosaic.write_rows(y_s, lambda rows: y_ref.at[rows, own], base, first, end)

        plgpu.wait_smem_to_gmem(0)

    a_block = (rank, DEPTH) if transposed else (DEPTH, rank)
    b_block = (COLUMNS, rank) if transposed else (rank, COLUMNS)
    like = DEPTH if transposed else rank
    run = compat.mosaic_kernel(
        body,
        name="segmented_matmul_rows",
        # The copy engine cuts off what lies past the last column; the interpreter does not.
        out_type=(
            jax.ShapeDtypeStruct((M, blocks * COLUMNS if compat.interpreting() else outputs), x.dtype),
            jax.ShapeDtypeStruct((M, line), jnp.float32),
        ),
        scratch_types=(
            matrices((stages, ROWS, DEPTH), x.dtype, like=like),
            matrices((stages, *a_block), x.dtype),
            matrices((ahead, *b_block), x.dtype, like=rank),
            # Not tiled: pieces of them begin at any row.
            plgpu.SMEM((ROWS, COLUMNS), x.dtype),
            plgpu.SMEM((ROWS, line), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=ahead),
        ),
        grid=(table.shape[0],),
        grid_names=("visit",),
        compiler_params=compiler_params(),
    )
    y, low = run(x, shrink, expand, scaling.astype(jnp.float32), table)
    return y[:, :outputs], low[:, :rank]
