"""The Hopper kernel of weights in 4 bits times rows in 8 (W4A8), or in 4 that lie one to a byte (W4A4).

Hopper has no products of 4 bits: codes are unpacked in registers and multiplied as int8. It computes the transposed product,
as the kernel of bfloat16 rows does (``mosaic_kernel.py``), since the operand that comes from registers is the left one. A
nibble without its bias is the upper half of a byte, and is left there: both halves are read 16 times too large, so that no
sign is extended, and the sums, exact in int32, are as much too large. A group of 128 inputs is a step whose sums are
scaled and added in float32, outputs' scales first; where rows have one scale, it multiplies the result.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, mosaic
from pallas_kernels.attention.common import ROWS, compiler_params, full, matrices
from pallas_kernels.quantized_matmul.mosaic_kernel import CONSUMERS, HIGH, OUTPUTS

# Inputs that share a scale: of 64, whose halves are 32 bytes, scales would take twice the instructions of products.
GROUP = 128
_WIDTH = GROUP // 2
# What a CTA may have, less barriers, scales of rows and what alignment loses.
_SHARED_BYTES = 220 * 1024


def stages_of(asked: int, columns: int, grouped: bool) -> int:
    """Groups in flight: as asked, or (0) as many as fit, at most 8."""
    each = OUTPUTS * (_WIDTH + 4) + columns * (GROUP + 4 * grouped)
    return asked or max(2, min(8, (_SHARED_BYTES - OUTPUTS * columns * 4) // each))


def launch(x: Any, x_scale: Any, codes: Any, scale: Any, *, columns: int, stages: int, splits: int):
    """f32[splits, N, M]: shares of the scaled sums, without the rows' scales where they have one each.

    Args:
        x: i8[2, M, K / 2], even inputs and odd ones; M a multiple of ``columns``.
        x_scale: f32[K / 128, M], or None.
        codes: u8[N, K / 2], N a multiple of OUTPUTS.
        scale: float[K / 128, N].
        columns: rows of x that a CTA has, 32, 64 or 128.
        stages: groups in flight; 0 for as many as fit.
        splits: shares of the groups, none empty.
    """
    pl, plgpu = compat.pl, compat.plgpu
    (_, M, _), (groups, N) = x.shape, scale.shape
    grouped = x_scale is not None
    stages = stages_of(stages, columns, grouped)
    share = -(-groups // splits)
    # The accumulators' layout, and that of four bytes a thread that the tensor cores take as the left operand.
    layout, packed = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_8BIT
    scales = (scale, x_scale) if grouped else (scale,)

    def body(x_ref, codes_ref, *refs):
        scale_refs, (out, x_s, codes_s, scales_s, out_s, ready, free) = (
            refs[: len(scales)],
            refs[len(scales) :],
        )
        split, n, m = (lax.axis_index(name) for name in ("split", "output", "column"))
        thread = lax.axis_index("warpgroup")
        first = jnp.minimum(split * share, groups)
        count = jnp.minimum(share, groups - first)
        outputs, rows = pl.ds(n * OUTPUTS, OUTPUTS), pl.ds(m * columns, columns)

        @pl.when(thread == CONSUMERS)
        def produce():
            def fetch(step, stage):
                group, done = first + step, ready.at[stage]
                inputs = pl.ds(group * _WIDTH, _WIDTH)
                plgpu.copy_gmem_to_smem(codes_ref.at[outputs, inputs], codes_s.at[stage], done)
                plgpu.copy_gmem_to_smem(x_ref.at[:, rows, inputs], x_s.at[stage], done)
                for ref, held, those in zip(scale_refs, scales_s, (outputs, rows), strict=False):
                    plgpu.copy_gmem_to_smem(ref.at[group, those], held.at[stage], done)

            mosaic.feed(count, stages, free, fetch)

        @pl.when(thread < CONSUMERS)
        def consume():
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(thread * ROWS, ROWS)

            def wide(vector, axis):
                return lax.broadcast_in_dim(vector, (ROWS, columns), [axis])

            def step(index, total):
                stage = lax.rem(index, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[stage])
                both = mosaic.load(codes_s.at[stage, own], packed)
                found: Any = None
                for part, operand in enumerate(mosaic.upper_nibbles(both, packed)):
                    found = mosaic.mma(found, operand, x_s.at[stage, part], transpose_b=True)
                gain = mosaic.load(scales_s[0].at[stage, own], layout.reduce(1)).astype(jnp.float32)
                gain = wide(gain * (1 / HIGH), 0)
                if grouped:
                    gain = gain * wide(mosaic.load(scales_s[1].at[stage], layout.reduce(0)), 1)
                total = total + found.astype(jnp.float32) * gain
                # What was read from shared memory is read before the next copy into it.
                plgpu.commit_smem()
                plgpu.barrier_arrive(free.at[stage])
                return total

            total = lax.fori_loop(0, count, step, full((ROWS, columns), 0.0, layout))
            mosaic.store(out_s.at[thread], total)
            plgpu.commit_smem()
            to = out.at[split, pl.ds(n * OUTPUTS + thread * ROWS, ROWS), rows]
            plgpu.copy_smem_to_gmem(out_s.at[thread], to)
            plgpu.wait_smem_to_gmem(0)

    run = compat.mosaic_kernel(
        body,
        name="quantized_matmul_packed",
        out_type=jax.ShapeDtypeStruct((splits, N, M), jnp.float32),
        scratch_types=(
            matrices((stages, 2, columns, _WIDTH), jnp.int8),
            matrices((stages, OUTPUTS, _WIDTH), jnp.int8),
            [plgpu.SMEM((stages, w), v.dtype) for v, w in zip(scales, (OUTPUTS, columns), strict=False)],
            matrices((CONSUMERS, ROWS, columns), jnp.float32),
            plgpu.Barrier(num_arrivals=2 + len(scales), num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ),
        # Neighbours in time share the outputs, whose codes are the more.
        grid=(splits, N // OUTPUTS, M // columns),
        grid_names=("split", "output", "column"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
    )
    # The same bytes: signed arithmetic is what the tensor cores' operand is in.
    return run(x, lax.bitcast_convert_type(codes, jnp.int8), *scales)
