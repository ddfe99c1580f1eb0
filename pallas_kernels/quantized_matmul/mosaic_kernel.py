"""The Hopper kernel of weights in 4 bits: codes by TMA, products of codes on the tensor cores, scales on their sums.

It computes the transposed product, outputs times rows of x: the operand that comes from registers is the left one, whose
size is fixed at 64, and x may be as few as 8 columns. Two warpgroups have 64 outputs each and share the tile of x that a
third one brings. Codes 0..15 are exact in bfloat16, so nothing is rounded before the sums of a group, which are scaled in
float32; the bias of the codes and the offset are one term more, times the sum of x over the group. The high nibble is not
shifted down: it is read 16 times too large, and the odd inputs that it meets were made as much smaller.

Codes of NVFP4 become values in registers, e2m1 times e4m3, exact in bfloat16, and one sum runs over all inputs. The 16
inputs of a scale are 8 bytes, thus 8 columns of either operand.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, mosaic
from pallas_kernels.attention.common import ROWS, compiler_params, full, matrices
from pallas_kernels.quantized_matmul.codes import BIAS

CONSUMERS = 2
# Outputs of a CTA.
OUTPUTS = CONSUMERS * ROWS
_LOW, _HIGH = 15, 240
# What the high nibble is read too large.
HIGH = 16.0
# Of the 227 KiB that a CTA may have, what the result and vectors leave.
_SHARED_BYTES = 150 * 1024


@dataclass(frozen=True)
class Tiles:
    """stages: groups in flight, 0 for as many as fit, at most 8; splits: shares of the inputs, 0 for as many as fill the
    device twice."""

    stages: int = 0
    splits: int = 0

    def candidates(self) -> list["Tiles"]:
        """What the tuner tries."""
        return [Tiles(stages, splits) for stages in (0, 4) for splits in (0, 1, 2, 4, 8)]


def scales_wide(blocks: list[jax.Array], shape: tuple[int, int], layout: Any) -> jax.Array:
    """f32[ROWS, columns], half of each value's e4m3 scale, of its bytes i32[ROWS] by blocks of 8 columns."""
    block = mosaic.iota(shape, 1, layout) >> 3
    wide: Any = None
    for number, bits in enumerate(blocks):
        # The exponent of float32 is 120 more; the least ones of e4m3 have none, nor has 127 a number.
        magnitude = bits & 127
        normal = lax.bitcast_convert_type((magnitude << 20) + (119 << 23), jnp.float32)
        half = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * 2.0**-10, normal)
        half = jnp.where(magnitude == 127, jnp.float32(jnp.nan), jnp.where(bits > 127, -half, half))
        half = lax.broadcast_in_dim(half, shape, [0])
        wide = half if wide is None else jnp.where(block == number, half, wide)
    return wide


def e2m1_halves(nibbles: jax.Array) -> jax.Array:
    """f32, twice the values of e2m1 codes i32 0..15."""
    magnitude = nibbles & 7
    twice = magnitude + jnp.maximum(magnitude - 4, 0) + jnp.where(magnitude == 7, 2, 0)
    return jnp.where(nibbles > 7, -twice, twice).astype(jnp.float32)


def stages_of(config: Tiles, group: int, columns: int) -> int:
    """Groups in flight."""
    each = OUTPUTS * group // 2 + columns * group * 2 + OUTPUTS * 8 + columns * 4
    return config.stages or max(2, min(8, _SHARED_BYTES // each))


def launch(x: Any, sums: Any, codes: Any, scale: Any, offset: Any, *, config: Tiles, splits: int):
    """f32[splits, N, M]: sums over shares of the groups.

    Args:
        x: bf16[2, M, K / 2], even inputs, and odd ones HIGH times too small; M a multiple of the columns of a tile.
        sums: f32[blocks, G, columns], the sum of x over each group, by blocks of columns of the result; of NVFP4 only
            its shape counts, a group being what a step takes.
        codes: u8[N, K / 2], N a multiple of OUTPUTS.
        scale: [G, N]; of NVFP4 the bytes u8[K / 16, N].
        offset: as scale, or None.
    """
    pl, plgpu = compat.pl, compat.plgpu
    (_, M, half), (blocks, groups, columns), N = x.shape, sums.shape, codes.shape[0]
    width = half // groups
    stages = stages_of(config, 2 * width, columns)
    share = -(-groups // splits)
    layout = plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    affine = [scale] if offset is None else [scale, offset]
    nvfp4 = scale.dtype == jnp.uint8
    blocks_of_step = scale.shape[0] // groups

    def body(x_ref, sums_ref, codes_ref, *refs):
        affine_refs, (out, x_s, sums_s, codes_s, affine_s, out_s, ready, free) = (
            refs[: len(affine)],
            refs[len(affine) :],
        )
        split, n, m = (lax.axis_index(name) for name in ("split", "output", "column"))
        thread = lax.axis_index("warpgroup")
        first = jnp.minimum(split * share, groups)
        count = jnp.minimum(share, groups - first)

        @pl.when(thread == CONSUMERS)
        def produce():
            def fetch(step, stage):
                group, done = first + step, ready.at[stage]
                inputs, outputs = pl.ds(group * width, width), pl.ds(n * OUTPUTS, OUTPUTS)
                plgpu.copy_gmem_to_smem(codes_ref.at[outputs, inputs], codes_s.at[stage], done)
                rows = x_ref.at[:, pl.ds(m * columns, columns), inputs]
                plgpu.copy_gmem_to_smem(rows, x_s.at[stage], done)
                if nvfp4:
                    those = affine_refs[0].at[pl.ds(group * blocks_of_step, blocks_of_step), outputs]
                    plgpu.copy_gmem_to_smem(those, affine_s[0].at[stage], done)
                    return
                plgpu.copy_gmem_to_smem(sums_ref.at[m, group], sums_s.at[stage], done)
                for index, ref in enumerate(affine_refs):
                    plgpu.copy_gmem_to_smem(ref.at[group, outputs], affine_s[index].at[stage], done)

            mosaic.feed(count, stages, free, fetch)

        @pl.when(thread < CONSUMERS)
        def consume():
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(thread * ROWS, ROWS)

            def wide(vector, axis):
                return lax.broadcast_in_dim(vector.astype(jnp.float32), (ROWS, columns), [axis])

            def of_values(stage, total):
                both = mosaic.load(codes_s.at[stage, own], layout).astype(jnp.int32)
                each = [
                    mosaic.load(affine_s[0].at[stage, block, own], by_row).astype(jnp.int32)
                    for block in range(blocks_of_step)
                ]
                gain = scales_wide(each, (ROWS, width), layout)
                for part, nibbles in enumerate((both & _LOW, both >> 4)):
                    operand = (e2m1_halves(nibbles) * gain).astype(jnp.bfloat16)
                    total = mosaic.mma(total, operand, x_s.at[stage, part], transpose_b=True)
                return total

            def step(index, total):
                stage = lax.rem(index, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[stage])
                if nvfp4:
                    total = of_values(stage, total)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(free.at[stage])
                    return total
                both = mosaic.load(codes_s.at[stage, own], layout)
                product: Any = None
                for part, mask in enumerate((_LOW, _HIGH)):
                    operand = (both & jnp.uint8(mask)).astype(jnp.bfloat16)
                    product = mosaic.mma(product, operand, x_s.at[stage, part], transpose_b=True)
                each = wide(mosaic.load(sums_s.at[stage], by_column), 1)
                gain, *shift = (mosaic.load(kept.at[stage, own], by_row) for kept in affine_s)
                total = total + (product - each * BIAS) * wide(gain, 0)
                if shift:
                    total = total + each * wide(shift[0], 0)
                # What was read from shared memory is read before the next copy into it.
                plgpu.commit_smem()
                plgpu.barrier_arrive(free.at[stage])
                return total

            total = lax.fori_loop(0, count, step, full((ROWS, columns), 0.0, layout))
            out_s[own] = total
            plgpu.commit_smem()
            to = out.at[split, pl.ds(n * OUTPUTS + thread * ROWS, ROWS), pl.ds(m * columns, columns)]
            plgpu.copy_smem_to_gmem(out_s.at[own], to)
            plgpu.wait_smem_to_gmem(0)

    many = (blocks_of_step,) if nvfp4 else ()
    vectors = [plgpu.SMEM((stages, *many, OUTPUTS), each.dtype) for each in affine]
    run = compat.mosaic_kernel(
        body,
        name="quantized_matmul",
        out_type=jax.ShapeDtypeStruct((splits, N, M), jnp.float32),
        scratch_types=(
            matrices((stages, 2, columns, width), jnp.bfloat16),
            plgpu.SMEM((stages, columns), jnp.float32),
            matrices((stages, OUTPUTS, width), jnp.uint8),
            vectors,
            matrices((OUTPUTS, columns), jnp.float32),
            plgpu.Barrier(num_arrivals=3 if nvfp4 else 3 + len(affine), num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ),
        grid=(splits, N // OUTPUTS, blocks),
        grid_names=("split", "output", "column"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
    )
    return run(x, sums, codes, *affine)
