"""The Hopper kernel of RMSNorm and rounding: a row comes by TMA, is read twice in shared memory, and leaves in 8 bits.

One warpgroup has a row: its mean square and, where one scale serves all of it, its largest value are found in one pass,
codes in a second one. A row [K] is seen as [G, width], the width that of a group (128 without): a group lies with 4 to 16
neighbouring lanes of a warp, 8 values each, so that its largest value needs no shared memory. The last rows of that view
beyond G are zeros. Bound: 2 K bytes in and K out for each row in bfloat16, 4 K more with a residual, which comes and leaves.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.attention.common import full
from pallas_kernels.mosaic import cast_layout, load, store
from pallas_kernels.norm_quant.tiles import Tiles
from pallas_kernels.quantized_matmul.codes import LEAST, in_range, rounded

# Values of a row that one thread has of a block, next to each other.
VECTOR = 8
LANES = 128
# Width of the view of a row without groups, and what K is a multiple of.
WIDTH = 128
# Rows that one copy may have.
_COPIED = 256
# What a CTA may have, less barriers and what alignment loses.
SHARED_BYTES = 226 * 1024


@dataclass(frozen=True)
class Plan:
    """How a row is cut: ``count`` tiles [rows, width] that hold its G groups, each a number of blocks of 1024 values."""

    width: int
    groups: int
    rows: int
    count: int

    @classmethod
    def of(cls, K: int, group: int | None, tiles: Tiles) -> "Plan":
        width = group or WIDTH
        block = LANES * VECTOR // width
        blocks = -(-(K // width) // block)
        # More rows of a view would be more numbers to sum one by one.
        most = min(tiles.blocks, 32 // block)
        share = max(n for n in range(1, most + 1) if blocks % n == 0)
        return cls(width, K // width, share * block, blocks // share)

    @property
    def padded(self) -> int:
        return self.rows * self.count

    @property
    def layout(self) -> Any:
        """Of a tile: 4 warps by some rows of lanes by neighbouring lanes by neighbouring values."""
        lanes = self.width // VECTOR
        block = LANES * VECTOR // self.width
        tiling = compat.fragments.Tiling(((block, self.width), (32 // lanes, VECTOR)))
        return compat.plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)

    def shared_bytes(self, x: int, weight: int, arrays: int, stages: int) -> int:
        """Bytes of shared memory with items of so many bytes, and ``arrays`` of them that come with each row."""
        return self.padded * (self.width * (stages * arrays * x + weight + 1) + 8)


def compiler_params() -> Any:
    """Layouts are written out here; quotients and roots are as exact as Mosaic makes them, within 2 units in the last place."""
    plgpu = compat.plgpu
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def _folded(op: Callable[[Any, Any], Any], ref: Any) -> Any:
    """The numbers of a vector in shared memory folded into one, in their order."""
    if compat.interpreting():
        # Each read is a call to the host there.
        held = ref[...]
        return functools.reduce(op, [held[n] for n in range(ref.shape[0])])
    return functools.reduce(op, [ref[n] for n in range(ref.shape[0])])


def _narrowed(value: jax.Array, dtype: Any) -> jax.Array:
    """``value`` rounded; XLA, which runs the interpreter's arithmetic, may not leave it out."""
    if compat.interpreting():
        info = jnp.finfo(dtype)
        value = lax.reduce_precision(value, info.nexp, info.nmant)
    return value.astype(dtype)


def launch(
    x: Any,
    weight: Any,
    residual: Any,
    *,
    eps: float,
    group: int | None,
    clip: float,
    code_dtype: Any,
    tiles: Tiles,
) -> tuple[Any, Any, Any]:
    """Codes [M, K], scales f32[M, G'] with G' >= K / group (or [M, 1]), and the sums [M, K] or None.

    Args:
        x: [M, K], K a multiple of 128 and of the group.
        weight: [K].
        residual: [M, K] of the dtype of x, or None.
    """
    pl, plgpu = compat.pl, compat.plgpu
    (M, K), dtype = x.shape, x.dtype
    kind, top = in_range(code_dtype)
    plan = Plan.of(K, group, tiles)
    layout, G = plan.layout, plan.groups
    tile = (plan.rows, plan.width)
    rows = min(tiles.rows, M)
    arrays = 1 + (residual is not None)
    itemsizes = dtype.itemsize, weight.dtype.itemsize
    stages = min(tiles.stages, rows)
    if plan.shared_bytes(*itemsizes, arrays, stages) > SHARED_BYTES:
        stages = 1
    pieces = [(at, min(_COPIED, G - at)) for at in range(0, G, _COPIED)]

    def kernel(
        given, codes_out, scale_out, total_out, x_s, r_s, w_s, codes_s, squares_s, largest_s, ready, held
    ):
        x_ref, w_ref, r_ref = given
        first = lax.axis_index("rows") * rows
        count = jnp.minimum(rows, M - first)

        def fetch(r):
            place = lax.rem(r, jnp.int32(stages))
            for at, size in pieces:
                part, barrier = pl.ds(at, size), ready.at[place]
                plgpu.copy_gmem_to_smem(x_ref.at[first + r, part], x_s.at[place, part], barrier)
                if r_ref is not None:
                    plgpu.copy_gmem_to_smem(r_ref.at[first + r, part], r_s.at[place, part], barrier)

        def tile_of(ref, t):
            at = pl.ds(t * plan.rows, plan.rows)
            return load(ref.at[at], layout, optimized=False).astype(jnp.float32)

        def over_tiles(step, carry):
            return step(0, carry) if plan.count == 1 else lax.fori_loop(0, plan.count, step, carry)

        if plan.padded > G:
            last = pl.ds(plan.padded - plan.rows, plan.rows)
            for ref in (*(v.at[n] for n in range(stages) for v in (x_s, r_s)[:arrays]), w_s):
                store(ref.at[last], full(tile, 0.0, layout).astype(ref.dtype), optimized=False)
            # The copies below write a part of them anew.
            plgpu.commit_smem()
        for at, size in pieces:
            plgpu.copy_gmem_to_smem(w_ref.at[pl.ds(at, size)], w_s.at[pl.ds(at, size)], held)
        if stages > 1:
            fetch(jnp.int32(0))
        plgpu.barrier_wait(held)

        @pl.loop(0, count)
        def _row(r):
            r = r.astype(jnp.int32)
            place, row = lax.rem(r, jnp.int32(stages)), first + r
            pl.when(r + stages - 1 < count)(lambda: fetch(r + (stages - 1)))
            plgpu.barrier_wait(ready.at[place])
            own = x_s.at[place]

            def moments(t, carry):
                squares, largest = carry
                u = tile_of(own, t)
                if r_ref is not None:
                    narrow = _narrowed(u + tile_of(r_s.at[place], t), dtype)
                    # By the threads that read it there again.
                    store(own.at[pl.ds(t * plan.rows, plan.rows)], narrow, optimized=False)
                    u = narrow.astype(jnp.float32)
                if group is None:
                    largest = jnp.maximum(largest, jnp.abs(u * tile_of(w_s, t)))
                return squares + u * u, largest

            zeros = full(tile, 0.0, layout)
            squares, largest = over_tiles(moments, (zeros, zeros if group is None else jnp.float32(0)))
            store(squares_s, jnp.sum(squares, axis=1), optimized=False)
            if group is None:
                store(largest_s, jnp.max(largest, axis=1), optimized=False)
            # All four warps have written what each of them reads.
            plgpu.commit_smem()
            root = lax.rsqrt(_folded(jnp.add, squares_s) / jnp.float32(K) + jnp.float32(eps))

            def scale_of(most):
                return jnp.maximum(most, jnp.float32(LEAST)) * jnp.float32(clip) / jnp.float32(top)

            inverse = jnp.float32(1)
            if group is None:
                scale = scale_of(_folded(jnp.maximum, largest_s) * root)
                scale_out[row, 0] = scale
                inverse = inverse / scale

            def codes(t, carry):
                y = tile_of(own, t) * root * tile_of(w_s, t)
                at = pl.ds(t * plan.rows, plan.rows)
                if group is None:
                    steps = y * inverse
                else:
                    scale = scale_of(jnp.max(jnp.abs(y), axis=1))
                    store(scale_out.at[row, at], scale, optimized=False)
                    wide = lax.broadcast_in_dim(jnp.float32(1) / scale, tile, (0,))
                    # No layout is inferred from that of the scales.
                    steps = y * cast_layout(wide, layout)
                store(codes_s.at[at], rounded(steps, kind, top), optimized=False)
                return carry

            over_tiles(codes, jnp.int32(0))
            plgpu.commit_smem()
            for at, size in pieces:
                part = pl.ds(at, size)
                plgpu.copy_smem_to_gmem(codes_s.at[part], codes_out.at[row, part])
                if total_out is not None:
                    plgpu.copy_smem_to_gmem(own.at[part], total_out.at[row, part])
            plgpu.wait_smem_to_gmem(0)

    view = (G, plan.width)
    held = (plan.padded, plan.width)
    copies = len(pieces)
    some = jax.ShapeDtypeStruct
    found: Any = compat.mosaic_kernel(
        kernel,
        name="norm_quant",
        out_type=(
            some((M, *view), kind),
            some((M, 1 if group is None else plan.padded), jnp.float32),
            None if residual is None else some((M, *view), dtype),
        ),
        grid=(-(-M // rows),),
        grid_names=("rows",),
        scratch_types=(
            plgpu.SMEM((stages, *held), dtype),
            plgpu.SMEM((1,) if residual is None else (stages, *held), dtype),
            plgpu.SMEM(held, weight.dtype),
            plgpu.SMEM(held, kind),
            plgpu.SMEM((plan.rows,), jnp.float32),
            plgpu.SMEM((plan.rows,), jnp.float32),
            plgpu.Barrier(num_arrivals=arrays * copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=copies),
        ),
        compiler_params=compiler_params(),
    )(
        (
            x.reshape(M, *view),
            weight.reshape(view),
            None if residual is None else residual.reshape(M, *view),
        )
    )
    codes, scale, total = found
    return codes.reshape(M, K), scale, None if total is None else total.reshape(M, K)
