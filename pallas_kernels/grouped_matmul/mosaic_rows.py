"""The Hopper kernel of rows times their experts' weights, or times them transposed.

A CTA has one visit: a tile of rows, one expert, some columns of the result. Tiles begin at multiples of their size, for the
copy engine lays out eight rows at a time; where experts meet within a tile, each of them multiplies all of it and writes
its own rows only, in pieces of powers of two. A third warpgroup brings the operands for the two that multiply.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Int

from pallas_kernels import compat, mosaic
from pallas_kernels.attention.common import CONSUMERS, ROWS, compiler_params, full, matrices, rows_of
from pallas_kernels.grouped_matmul.tiles import DEPTH, Tiles
from pallas_kernels.grouped_matmul.visits import END, EXPERT, FIRST, TILE


def rows_by_experts(
    x: BFloat16[Array, "M I"],
    w: BFloat16[Array, "E a b"],
    table: Int[Array, "V 4"],
    *,
    transposed: bool,
    config: Tiles,
) -> BFloat16[Array, "M O"]:
    """``x[m] @ w[e]`` (w [E, I, O]), or ``x[m] @ w[e].T`` (w [E, O, I]); zeros for the rows of expert E.

    Args:
        table: visits of tiles of ``config.rows`` rows.
        config: with nothing left open.
    """
    pl, plgpu = compat.pl, compat.plgpu
    M, inputs = x.shape
    E, outputs = w.shape[0], w.shape[1 if transposed else 2]
    columns, stages = config.columns, config.stages
    # Two warpgroups share a tile by its rows, or where it has 64 by its columns.
    by_rows = config.rows > ROWS
    row_parts, column_parts = (CONSUMERS, 1) if by_rows else (1, CONSUMERS)
    width = columns // column_parts
    blocks, steps = -(-outputs // columns), inputs // DEPTH
    x = rows_of(x, 0, config.rows)
    w = rows_of(w, 1 if transposed else 2, columns)
    layout = plgpu.Layout.WGMMA

    def body(x_ref, w_ref, table_ref, out_ref, x_s, w_s, out_s, ready, free):
        visit, column = lax.axis_index("visit"), lax.axis_index("column")
        thread = lax.axis_index("warpgroup")
        tile, expert = table_ref[visit, TILE], table_ref[visit, EXPERT]
        first, end = table_ref[visit, FIRST], table_ref[visit, END]
        # Nothing is multiplied for rows of nobody, nor where no visit is left.
        count = jnp.where((expert < E) & (first < end), jnp.int32(steps), 0)

        @pl.when(thread == CONSUMERS)
        def produce():
            def fetch(step, stage):
                done, depth = ready.at[stage], pl.ds(step * DEPTH, DEPTH)
                for part in range(row_parts):
                    rows = pl.ds(tile * config.rows + part * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(x_ref.at[rows, depth], x_s.at[stage, part], done)
                for part in range(column_parts):
                    own = pl.ds(column * columns + part * width, width)
                    block = w_ref.at[expert, own, depth] if transposed else w_ref.at[expert, depth, own]
                    plgpu.copy_gmem_to_smem(block, w_s.at[stage, part], done)

            mosaic.feed(count, stages, free, fetch)

        @pl.when(thread < CONSUMERS)
        def consume():
            plgpu.set_max_registers(232, action="increase")
            row_part, column_part = (thread, 0) if by_rows else (0, thread)

            def step(index, total):
                stage = lax.rem(index, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[stage])
                total = mosaic.mma(
                    total, x_s.at[stage, row_part], w_s.at[stage, column_part], transpose_b=transposed
                )
                plgpu.barrier_arrive(free.at[stage])
                return total

            total = lax.fori_loop(0, count, step, full((ROWS, width), 0.0, layout))
            # Banks conflict in rows that are not tiled; this is once per tile.
            mosaic.store(out_s.at[thread], total.astype(x.dtype), optimized=False)
            plgpu.commit_smem()
            base = tile * config.rows + row_part * ROWS
            own = pl.ds(column * columns + column_part * width, width)
            mosaic.write_rows(out_s.at[thread], lambda rows: out_ref.at[rows, own], base, first, end)
            plgpu.wait_smem_to_gmem(0)

    w_block = (width, DEPTH) if transposed else (DEPTH, width)
    run = compat.mosaic_kernel(
        body,
        name="grouped_matmul_rows",
        # The copy engine cuts off what lies past the last column; the interpreter does not.
        out_type=jax.ShapeDtypeStruct((M, blocks * columns if compat.interpreting() else outputs), x.dtype),
        scratch_types=(
            matrices((stages, row_parts, ROWS, DEPTH), x.dtype),
            matrices((stages, column_parts, *w_block), x.dtype),
            # Not tiled: pieces of it begin at any row.
            plgpu.SMEM((CONSUMERS, ROWS, width), x.dtype),
            plgpu.Barrier(num_arrivals=row_parts + column_parts, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ),
        grid=(table.shape[0], blocks),
        grid_names=("visit", "column"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
    )
    return run(x, w, table)[:, :outputs]
