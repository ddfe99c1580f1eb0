"""The Hopper kernel of codes of 8 bits times codes of 8 bits: products on the tensor cores, scales on their sums.

Both operands lie K-major, the only order in which the tensor cores take 8 bits, so either may be the left one: the caller
puts the many rows there, and ``y`` comes out as it is or transposed. Two warpgroups have 64 rows of the left operand each
and share the tile of the right one that a third brings.

With one scale a row and integers, the sum over all inputs stays in the tensor cores, exact. Where groups have scales of
their own, a group is a step whose sum is scaled and added in float32. So is every step of float8, scale or not: Hopper
keeps about 14 bits of such a sum, and DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) therefore adds 128 inputs at a time up
in float32. Within those 128 the result is that of the tensor cores, not of float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, mosaic
from pallas_kernels.attention.common import ROWS, compiler_params, full, matrices, rows_of
from pallas_kernels.quantized_matmul.mosaic_kernel import CONSUMERS

# Rows of the left operand that a CTA has.
LEFT = CONSUMERS * ROWS
# Inputs of one step without groups: the bytes that shared memory swizzles, of which the copy engine lays out whole ones.
DEPTHS = (128, 64, 32)
# Columns of the result that leave together.
_LEAVING = 128
# What a CTA may have, less barriers and what alignment loses.
_SHARED_BYTES = 220 * 1024


def apart(dtype: Any, groups: int) -> bool:
    """Whether every step has a sum of its own: registers for two tiles of sums, then."""
    return groups > 1 or dtype != jnp.int8


def depth_of(inputs: int, groups: int) -> int:
    """Inputs of one step: a group, or as many as divide them all."""
    return inputs // groups if groups > 1 else next(depth for depth in DEPTHS if inputs % depth == 0)


def stages_of(asked: int, depth: int, columns: int, out_bytes: int) -> int:
    """Steps in flight: as asked, or (0) as many as fit, at most 8."""
    scales = 4 * (LEFT + columns)
    each = (LEFT + columns) * depth + scales
    return asked or max(2, min(8, (_SHARED_BYTES - scales - LEFT * out_bytes) // each))


def launch(
    a: Any, b: Any, a_scale: Any, b_scale: Any, *, columns: int, splits: int, stages: int, out_dtype: Any
):
    """[splits, P', Q']: shares of the scaled sums ``a @ b.T``, P' >= P and Q' >= Q.

    One share is of ``out_dtype``. Several are of float32, and where there are no groups they are the sums as they are, of
    int32 or float32: who adds them scales them.

    Args:
        a: [P, K] codes of 8 bits, K a multiple of 32.
        b: [Q, K] codes of the same dtype, Q a multiple of 64 or at most ``columns``.
        a_scale: [G, P], or [1, P] for all groups.
        b_scale: [G, Q], or [1, Q] for all groups.
        columns: rows of b that a CTA has, 32, 64, 128, or 256 unless steps are ``apart``.
        splits: shares of the inputs, none empty.
        stages: steps in flight; 0 for as many as fit.
    """
    pl, plgpu = compat.pl, compat.plgpu
    groups = max(a_scale.shape[0], b_scale.shape[0])
    grouped, own_sums = groups > 1, apart(a.dtype, groups)
    depth = depth_of(a.shape[1], groups)
    a, b = rows_of(a, 0, LEFT), rows_of(b, 0, columns)
    a_scale, b_scale = rows_of(a_scale, 1, LEFT), rows_of(b_scale, 1, columns)
    (P, K), Q = a.shape, b.shape[0]
    steps = K // depth
    share = -(-steps // splits)
    scaled = grouped or splits == 1
    exact = jnp.float32 if own_sums else jnp.int32
    out_dtype = jnp.dtype(out_dtype if splits == 1 else exact)
    leaving = min(columns, _LEAVING)
    stages = stages_of(stages, depth, columns, leaving * out_dtype.itemsize)
    layout = plgpu.Layout.WGMMA
    scales = (a_scale, b_scale)

    def body(a_ref, b_ref, *refs):
        scale_refs, (out, a_s, b_s, *scales_s, out_s, ready, free, epilogue) = refs[:2], refs[2:]
        split, column, row = (lax.axis_index(name) for name in ("split", "column", "row"))
        thread = lax.axis_index("warpgroup")
        first = jnp.minimum(split * share, steps)
        count = jnp.minimum(share, steps - first)
        rows = [pl.ds(row * LEFT + part * ROWS, ROWS) for part in range(CONSUMERS)]
        others = pl.ds(column * columns, columns)

        def fetch_scales(group, place, done):
            for ref, held, where in zip(scale_refs, scales_s, (pl.ds(row * LEFT, LEFT), others), strict=True):
                at = jnp.minimum(group, ref.shape[0] - 1)
                plgpu.copy_gmem_to_smem(ref.at[at, where], held.at[place], done)

        @pl.when(thread == CONSUMERS)
        def produce():
            if scaled and not grouped:
                fetch_scales(0, 0, epilogue.at[0])

            def fetch(step, stage):
                done, inputs = ready.at[stage], pl.ds((first + step) * depth, depth)
                for part in range(CONSUMERS):
                    plgpu.copy_gmem_to_smem(a_ref.at[rows[part], inputs], a_s.at[stage, part], done)
                plgpu.copy_gmem_to_smem(b_ref.at[others, inputs], b_s.at[stage], done)
                if grouped:
                    fetch_scales(first + step, stage, done)

            mosaic.feed(count, stages, free, fetch)

        @pl.when(thread < CONSUMERS)
        def consume():
            plgpu.set_max_registers(232, action="increase")

            def gains(place, begin, width):
                """f32[ROWS, width]: products of the scales of a row and a column."""
                own = (pl.ds(thread * ROWS, ROWS), pl.ds(begin, width))
                left, right = (
                    lax.broadcast_in_dim(
                        mosaic.load(scales_s[axis].at[place, own[axis]], layout.reduce(1 - axis)).astype(
                            jnp.float32
                        ),
                        (ROWS, width),
                        [axis],
                    )
                    for axis in (0, 1)
                )
                return left * right

            def step(index, total):
                stage = lax.rem(index, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[stage])
                found = mosaic.mma(
                    None if own_sums else total, a_s.at[stage, thread], b_s.at[stage], transpose_b=True
                )
                if grouped:
                    found = found.astype(jnp.float32) * gains(stage, 0, columns)
                    # The scales are read before the next copy over them.
                    plgpu.commit_smem()
                plgpu.barrier_arrive(free.at[stage])
                return total + found if own_sums else found

            total = lax.fori_loop(0, count, step, full((ROWS, columns), 0.0, layout, exact))
            if scaled and not grouped:
                plgpu.barrier_wait(epilogue.at[0])
            for begin in range(0, columns, leaving):
                part = lax.slice(total, (0, begin), (ROWS, begin + leaving))
                if scaled and not grouped:
                    part = part.astype(jnp.float32) * gains(0, begin, leaving)
                mosaic.store(out_s.at[thread], part.astype(out_dtype))
                plgpu.commit_smem()
                to = out.at[
                    split,
                    pl.ds(row * LEFT + thread * ROWS, ROWS),
                    pl.ds(column * columns + begin, leaving),
                ]
                plgpu.copy_smem_to_gmem(out_s.at[thread], to)
                plgpu.wait_smem_to_gmem(0)

    places = stages if grouped else 1
    run = compat.mosaic_kernel(
        body,
        name="quantized_matmul_codes",
        out_type=jax.ShapeDtypeStruct((splits, P, Q), out_dtype),
        scratch_types=(
            matrices((stages, CONSUMERS, ROWS, depth), a.dtype),
            matrices((stages, columns, depth), b.dtype),
            *(plgpu.SMEM((places, w), v.dtype) for v, w in zip(scales, (LEFT, columns), strict=True)),
            matrices((CONSUMERS, ROWS, leaving), out_dtype),
            plgpu.Barrier(num_arrivals=CONSUMERS + 1 + 2 * grouped, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=1),
        ),
        # Neighbours in time share the columns, which are the more.
        grid=(splits, -(-Q // columns), -(-P // LEFT)),
        grid_names=("split", "column", "row"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
    )
    return run(a, b, *scales)
