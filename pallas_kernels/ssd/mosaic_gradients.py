"""The kernels of the gradients, one warpgroup per 64 tokens of a group, whose heads it goes through and sums.

The one of C's gradient has the later tokens of a chunk and goes over the earlier ones, that of x's and B's gradients the
other way round. Each sums in a fixed order, without atomics. The gradient of the log decays is left as sums over the
pairs that a token ends and begins, over what the state gives it and over what it adds to the state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels import compat
from pallas_kernels.attention.common import ROWS, compiler_params, full, matrices
from pallas_kernels.mosaic import iota, load, mma
from pallas_kernels.ssd.mosaic_outputs import behind, fading
from pallas_kernels.ssd.pieces import ADDS, LAST, SEES, Pieces
from pallas_kernels.ssd.tiles import Tiles


def _wide(v: Any) -> jax.Array:
    return load(v, compat.plgpu.Layout.WGMMA).astype(jnp.float32)


def _rows(v: Any, like: Any) -> jax.Array:
    return lax.broadcast_in_dim(v, like.shape, (0,))


def output_gradients(
    x: BFloat16[Array, "B L H P"] | None,
    dy: BFloat16[Array, "B L H P"],
    B: BFloat16[Array, "B L G N"],
    C: BFloat16[Array, "B L G N"],
    rows: Float[Array, "B H 3 L"],
    pieces: Pieces,
    states: BFloat16[Array, "B p H P N"],
    inner: Float[Array, "B p H"],
    *,
    chunk: int,
    tiles: Tiles,
    name: str = "ssd_output_gradients",
) -> tuple[BFloat16[Array, "B L G N"], Float[Array, "B H L"]]:
    """The gradient of C, and per token what its log decay gets from the pairs it ends and from the state it sees.

    ``rows``: log decays, base 2, since the document or the chunk began, dt, and the factors of what is added to states;
    ``inner``: products of the states with the cotangents of the states after their pieces; x None: what tokens take from
    the states only, nothing of each other.
    """
    within_chunks, x = x is not None, dy if x is None else x
    batch, L, H, P = dy.shape
    G, N = B.shape[2:]
    blocks, stages, heads = chunk // ROWS, tiles.stages, H // G
    pl, plgpu = compat.pl, compat.plgpu
    layout = plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)

    def kernel(
        x_ref, dy_ref, B_ref, C_ref, rows_ref, ids_ref, table_ref, spans_ref, states_ref, inner_ref, *refs
    ):
        (
            dC_ref,
            reach_ref,
            C_s,
            own_ids_s,
            dy_s,
            own_s,
            x_s,
            B_s,
            rows_s,
            ids_s,
            state_s,
            dC_s,
            reach_s,
            *bars,
        ) = refs
        own_in, head_in, state_in, block_in = bars
        b, g, block = (lax.axis_index(name) for name in ("row", "group", "block"))
        c, within = lax.div(block, jnp.int32(blocks)), lax.rem(block, jnp.int32(blocks))
        own = pl.ds(block * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(C_ref.at[b, own, g], C_s, own_in)
        plgpu.copy_gmem_to_smem(ids_ref.at[b, own], own_ids_s, own_in)
        plgpu.barrier_wait(own_in)
        ids = load(own_ids_s, by_row)

        def head(e, dC):
            h = g * heads + e

            def fetch(j):
                slot = lax.rem(j, jnp.int32(stages))
                at = pl.ds((c * blocks + j) * ROWS, ROWS)
                for source, target in (
                    (x_ref.at[b, at, h], x_s),
                    (B_ref.at[b, at, g], B_s),
                    (rows_ref.at[b, h, :, at], rows_s),
                    (ids_ref.at[b, at], ids_s),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], block_in.at[slot])

            plgpu.copy_gmem_to_smem(dy_ref.at[b, own, h], dy_s, head_in)
            plgpu.copy_gmem_to_smem(rows_ref.at[b, h, :, own], own_s, head_in)
            plgpu.barrier_wait(head_in)
            decay = load(own_s.at[0], by_row)

            def entering(n, carry):
                dC, reach = carry
                piece = spans_ref[b, c, 0] + n
                plgpu.copy_gmem_to_smem(states_ref.at[b, piece, h], state_s, state_in)
                plgpu.barrier_wait(state_in)
                weight = jnp.where(ids == table_ref[b, piece, SEES], jnp.exp2(decay), 0.0)
                given = mma(None, C_s, state_s, transpose_b=True)
                dy = _wide(dy_s)
                # What passes through the whole piece decays as what the piece's last token sees of it.
                here = iota((ROWS,), 0, by_row) + block * ROWS == table_ref[b, piece, LAST]
                through = jnp.where(here, inner_ref[b, piece, h], 0.0)
                reach = reach + weight * ((given * dy).sum(axis=1) + through)
                dC = mma(dC, (dy * _rows(weight, dy)).astype(x.dtype), state_s)
                plgpu.commit_smem()
                return dC, reach

            carry = (dC, full((ROWS,), 0.0, by_row))
            carry = lax.fori_loop(0, spans_ref[b, c, 1], entering, carry)
            count = within + 1 if within_chunks else jnp.int32(0)
            pl.loop(0, jnp.minimum(count, stages))(fetch)

            def inside(j, carry):
                dC, reach = carry
                slot = lax.rem(j, jnp.int32(stages))
                plgpu.barrier_wait(block_in.at[slot])
                apart = (within - j) * ROWS
                other, other_ids = load(rows_s.at[slot, 0], by_column), load(ids_s.at[slot], by_column)
                slopes = fading(decay, other, ids, other_ids, apart, 0)
                slopes = slopes * lax.broadcast_in_dim(
                    load(rows_s.at[slot, 1], by_column), slopes.shape, (1,)
                )
                slopes = slopes * mma(None, dy_s, x_s.at[slot], transpose_b=True)
                pairs = slopes * mma(None, C_s, B_s.at[slot], transpose_b=True)
                # No decay lies between a token and itself.
                reach = reach + behind(pairs, apart, 0, 1, 0.0).sum(axis=1)
                dC = mma(dC, slopes.astype(x.dtype), B_s.at[slot])
                plgpu.commit_smem()
                pl.when(j + stages < count)(lambda: fetch(j + stages))
                return dC, reach

            dC, reach = lax.fori_loop(0, count, inside, carry)
            reach_s[...] = reach
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(reach_s, reach_ref.at[b, h, own])
            plgpu.wait_smem_to_gmem(0)
            plgpu.commit_smem()
            return dC

        dC = lax.fori_loop(0, heads, head, full((ROWS, N), 0.0, layout))
        dC_s[...] = dC.astype(x.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dC_s, dC_ref.at[b, own, g])
        plgpu.wait_smem_to_gmem(0)

    return compat.mosaic_kernel(
        kernel,
        name=name,
        out_type=(
            jax.ShapeDtypeStruct(C.shape, C.dtype),
            jax.ShapeDtypeStruct((batch, H, L), jnp.float32),
        ),
        grid=(G, L // ROWS, batch),
        grid_names=("group", "block", "row"),
        scratch_types=(
            matrices((ROWS, N), C.dtype),
            plgpu.SMEM((ROWS,), jnp.int32),
            matrices((ROWS, P), dy.dtype),
            plgpu.SMEM((3, ROWS), jnp.float32),
            matrices((stages, ROWS, P), x.dtype),
            matrices((stages, ROWS, N), B.dtype),
            plgpu.SMEM((stages, 3, ROWS), jnp.float32),
            plgpu.SMEM((stages, ROWS), jnp.int32),
            matrices((P, N), states.dtype),
            matrices((ROWS, N), C.dtype),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        ),
        compiler_params=compiler_params(),
    )(x, dy, B, C, rows, pieces.ids, pieces.table, pieces.spans, states, inner)


def input_gradients(
    x: BFloat16[Array, "B L H P"],
    dy: BFloat16[Array, "B L H P"],
    B: BFloat16[Array, "B L G N"],
    C: BFloat16[Array, "B L G N"],
    D: Float[Array, "H"] | None,
    rows: Float[Array, "B H 3 L"],
    pieces: Pieces,
    dstates: BFloat16[Array, "B p H P N"],
    *,
    chunk: int,
    tiles: Tiles,
    name: str = "ssd_input_gradients",
) -> tuple[BFloat16[Array, "B L H P"], BFloat16[Array, "B L G N"], Float[Array, "B H 3 L"]]:
    """The gradients of x (the skip included) and of B, and three sums per token.

    Arguments are as of :func:`output_gradients`; ``dstates`` are the cotangents of the states after each piece.

    Returns:
        dx, dB, and per token: the product of x with the gradient of ``dt x``; what the pairs it begins take from its log
        decay; what it adds to the state, times the state's cotangent.
    """
    batch, L, H, P = x.shape
    G, N = B.shape[2:]
    blocks, stages, heads = chunk // ROWS, tiles.stages, H // G
    pl, plgpu = compat.pl, compat.plgpu
    layout = plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    skip = () if D is None else (D,)

    def kernel(x_ref, dy_ref, B_ref, C_ref, rows_ref, ids_ref, table_ref, spans_ref, dstates_ref, *refs):
        D_ref = None if D is None else refs[0]
        dx_ref, dB_ref, sums_ref, B_s, own_ids_s, x_s, own_s, dy_s, C_s, rows_s, ids_s, *more = refs[
            len(skip) :
        ]
        dstate_s, dx_s, dB_s, sums_s, own_in, head_in, state_in, block_in = more
        b, g, block = (lax.axis_index(name) for name in ("row", "group", "block"))
        c, within = lax.div(block, jnp.int32(blocks)), lax.rem(block, jnp.int32(blocks))
        own = pl.ds(block * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(B_ref.at[b, own, g], B_s, own_in)
        plgpu.copy_gmem_to_smem(ids_ref.at[b, own], own_ids_s, own_in)
        plgpu.barrier_wait(own_in)
        ids = load(own_ids_s, by_row)

        def head(e, dB):
            h = g * heads + e

            def fetch(i):
                slot = lax.rem(i - within, jnp.int32(stages))
                at = pl.ds((c * blocks + i) * ROWS, ROWS)
                for source, target in (
                    (dy_ref.at[b, at, h], dy_s),
                    (C_ref.at[b, at, g], C_s),
                    (rows_ref.at[b, h, :, at], rows_s),
                    (ids_ref.at[b, at], ids_s),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], block_in.at[slot])

            plgpu.copy_gmem_to_smem(x_ref.at[b, own, h], x_s, head_in)
            plgpu.copy_gmem_to_smem(rows_ref.at[b, h, :, own], own_s, head_in)
            if D_ref is not None:
                # The own rows of dy wait where dx will stand.
                plgpu.copy_gmem_to_smem(dy_ref.at[b, own, h], dx_s, head_in)
            plgpu.barrier_wait(head_in)

            def leaving(n, carry):
                dxb, dB, stored = carry
                piece = spans_ref[b, c, 0] + n
                plgpu.copy_gmem_to_smem(dstates_ref.at[b, piece, h], dstate_s, state_in)
                plgpu.barrier_wait(state_in)
                adds = ids == table_ref[b, piece, ADDS]
                weight = jnp.where(adds, load(own_s.at[2], by_row), 0.0)
                given = mma(None, B_s, dstate_s, transpose_b=True)
                given = given * _rows(weight, given)
                dxb = dxb + given
                x = _wide(x_s)
                weight = weight * load(own_s.at[1], by_row)
                stored = stored + (given * x).sum(axis=1)
                dB = mma(dB, (x * _rows(weight, x)).astype(dy.dtype), dstate_s)
                plgpu.commit_smem()
                return dxb, dB, stored

            carry = (full((ROWS, P), 0.0, layout), dB, full((ROWS,), 0.0, by_row))
            dxb, dB, stored = lax.fori_loop(0, spans_ref[b, c, 1], leaving, carry)
            dt = load(own_s.at[1], by_row)
            sums_s[2] = stored * dt
            pl.loop(within, jnp.minimum(within + stages, blocks))(fetch)

            def inside(i, carry):
                dxb, dB, begun = carry
                slot = lax.rem(i - within, jnp.int32(stages))
                plgpu.barrier_wait(block_in.at[slot])
                apart = (i - within) * ROWS
                later, later_ids = load(rows_s.at[slot, 0], by_column), load(ids_s.at[slot], by_column)
                fade = fading(later, load(own_s.at[0], by_row), later_ids, ids, apart, 1)
                slopes = fade * mma(None, x_s, dy_s.at[slot], transpose_b=True)
                slopes = slopes * _rows(load(own_s.at[1], by_row), fade)
                dB = mma(dB, slopes.astype(x.dtype), C_s.at[slot])
                scores = fade * mma(None, B_s, C_s.at[slot], transpose_b=True)
                dxb = mma(dxb, scores.astype(x.dtype), dy_s.at[slot])
                # Multiplied again, at an eighth more work: kept, it would not fit the registers.
                slopes = mma(None, x_s, dy_s.at[slot], transpose_b=True)
                begun = begun + behind(slopes * scores, apart, 1, 1, 0.0).sum(axis=1)
                plgpu.commit_smem()
                pl.when(i + stages < blocks)(lambda: fetch(i + stages))
                return dxb, dB, begun

            dxb, dB, begun = lax.fori_loop(within, blocks, inside, (dxb, dB, full((ROWS,), 0.0, by_row)))
            dt = load(own_s.at[1], by_row)
            sums_s[0] = (dxb * _wide(x_s)).sum(axis=1)
            sums_s[1] = begun * dt
            dx = dxb * _rows(dt, dxb)
            if D_ref is not None:
                dx = dx + D_ref[h] * _wide(dx_s)
                plgpu.commit_smem()
            dx_s[...] = dx.astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dx_s, dx_ref.at[b, own, h])
            plgpu.copy_smem_to_gmem(sums_s, sums_ref.at[b, h, :, own])
            plgpu.wait_smem_to_gmem(0)
            plgpu.commit_smem()
            return dB

        dB = lax.fori_loop(0, heads, head, full((ROWS, N), 0.0, layout))
        dB_s[...] = dB.astype(x.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dB_s, dB_ref.at[b, own, g])
        plgpu.wait_smem_to_gmem(0)

    return compat.mosaic_kernel(
        kernel,
        name=name,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(B.shape, B.dtype),
            jax.ShapeDtypeStruct((batch, H, 3, L), jnp.float32),
        ),
        grid=(G, L // ROWS, batch),
        grid_names=("group", "block", "row"),
        scratch_types=(
            matrices((ROWS, N), B.dtype),
            plgpu.SMEM((ROWS,), jnp.int32),
            matrices((ROWS, P), x.dtype),
            plgpu.SMEM((3, ROWS), jnp.float32),
            matrices((stages, ROWS, P), dy.dtype),
            matrices((stages, ROWS, N), C.dtype),
            plgpu.SMEM((stages, 3, ROWS), jnp.float32),
            plgpu.SMEM((stages, ROWS), jnp.int32),
            matrices((P, N), dstates.dtype),
            matrices((ROWS, P), x.dtype),
            matrices((ROWS, N), B.dtype),
            plgpu.SMEM((3, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2 + len(skip)),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        ),
        compiler_params=compiler_params(),
    )(x, dy, B, C, rows, pieces.ids, pieces.table, pieces.spans, dstates, *skip)
