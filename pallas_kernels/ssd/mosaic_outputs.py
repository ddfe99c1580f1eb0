"""The kernel of the outputs: one warpgroup has 64 tokens of a head, and goes over the blocks of their chunk before them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels import compat
from pallas_kernels.attention.common import ROWS, compiler_params, full, matrices
from pallas_kernels.mosaic import iota, load, mma
from pallas_kernels.ssd.pieces import SEES, Pieces


def behind(values: Any, apart: Any, axis: int, least: int, otherwise: float) -> jax.Array:
    """``values`` f32[64, 64] where the token along ``axis`` is at least so many behind the other one; ``otherwise`` elsewhere.

    Args:
        values: of pairs of tokens.
        apart: tokens from the begin of the other block to that of the block along ``axis``.
        axis: 0 or 1.
        least: 0: a token counts as behind itself; 1: it does not.
        otherwise: what the other pairs get.
    """
    layout = compat.plgpu.Layout.WGMMA

    # Two vectors: a tile of differences would be kept in registers of its own.
    def place(axis):
        return iota((ROWS,), 0, layout.reduce(1 - axis))

    later = lax.broadcast_in_dim(place(axis) + (apart - least), values.shape, (axis,))
    earlier = lax.broadcast_in_dim(place(1 - axis), values.shape, (1 - axis,))
    return jnp.where(later >= earlier, values, otherwise)


def fading(later: Any, earlier: Any, ids: Any, other_ids: Any, apart: Any, axis: int) -> jax.Array:
    """Decays from tokens of one block to those of another, f32[64, 64]; 0 between documents and back in time.

    Args:
        later: log decays, base 2, of the later tokens, those along ``axis``.
        earlier: the same of the earlier tokens.
        ids: documents of the later tokens.
        other_ids: documents of the earlier tokens.
        apart: tokens from the begin of the earlier block to that of the later one.
        axis: 0 or 1.
    """

    def along(v, axis):
        return lax.broadcast_in_dim(v, (ROWS, ROWS), (axis,))

    reach = along(later, axis) - along(earlier, 1 - axis)
    reach = jnp.where(along(ids, axis) == along(other_ids, 1 - axis), reach, -jnp.inf)
    # Masked before the exponential: back in time the difference is positive and may overflow.
    return jnp.exp2(behind(reach, apart, axis, 0, -jnp.inf))


def outputs(
    x: BFloat16[Array, "B L H P"],
    B: BFloat16[Array, "B L G N"],
    C: BFloat16[Array, "B L G N"],
    D: Float[Array, "H"] | None,
    rows: Float[Array, "B H 2 L"],
    pieces: Pieces,
    states: BFloat16[Array, "B p H P N"],
    *,
    chunk: int,
    stages: int,
    name: str = "ssd_outputs",
) -> BFloat16[Array, "B L H P"]:
    """y, the skip included; ``rows``: log decays, base 2, since the document or the chunk began, and dt."""
    batch, L, H, P = x.shape
    G, N = B.shape[2:]
    blocks, heads = chunk // ROWS, H // G
    pl, plgpu = compat.pl, compat.plgpu
    layout = plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    skip = () if D is None else (D,)

    def kernel(x_ref, B_ref, C_ref, rows_ref, ids_ref, table_ref, spans_ref, states_ref, *refs):
        D_ref = None if D is None else refs[0]
        y_ref, C_s, own_s, own_ids_s, x_s, B_s, rows_s, ids_s, state_s, y_s, *barriers = refs[len(skip) :]
        own_in, state_in, block_in = barriers
        b, h, block = (lax.axis_index(name) for name in ("row", "head", "block"))
        g, c = lax.div(h, jnp.int32(heads)), lax.div(block, jnp.int32(blocks))
        within = lax.rem(block, jnp.int32(blocks))
        own = pl.ds(block * ROWS, ROWS)

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

        plgpu.copy_gmem_to_smem(C_ref.at[b, own, g], C_s, own_in)
        plgpu.copy_gmem_to_smem(rows_ref.at[b, h, :, own], own_s, own_in)
        plgpu.copy_gmem_to_smem(ids_ref.at[b, own], own_ids_s, own_in)
        pl.loop(0, jnp.minimum(within + 1, stages))(fetch)
        plgpu.barrier_wait(own_in)
        decay, ids = load(own_s.at[0], by_row), load(own_ids_s, by_row)

        def entering(n, y):
            piece = spans_ref[b, c, 0] + n
            plgpu.copy_gmem_to_smem(states_ref.at[b, piece, h], state_s, state_in)
            plgpu.barrier_wait(state_in)
            weight = jnp.where(ids == table_ref[b, piece, SEES], jnp.exp2(decay), 0.0)
            y = y + mma(None, C_s, state_s, transpose_b=True) * lax.broadcast_in_dim(weight, y.shape, (0,))
            # No warp reads the state any more when the next one comes.
            plgpu.commit_smem()
            return y

        y = lax.fori_loop(0, spans_ref[b, c, 1], entering, full((ROWS, P), 0.0, layout))

        def inside(j, y):
            slot = lax.rem(j, jnp.int32(stages))
            plgpu.barrier_wait(block_in.at[slot])
            other, other_ids = load(rows_s.at[slot, 0], by_column), load(ids_s.at[slot], by_column)
            weights = fading(decay, other, ids, other_ids, (within - j) * ROWS, 0)
            weights = weights * lax.broadcast_in_dim(load(rows_s.at[slot, 1], by_column), weights.shape, (1,))
            weights = weights * mma(None, C_s, B_s.at[slot], transpose_b=True)
            y = mma(y, weights.astype(x.dtype), x_s.at[slot])
            plgpu.commit_smem()
            pl.when(j + stages <= within)(lambda: fetch(j + stages))
            return y

        y = lax.fori_loop(0, within + 1, inside, y)
        if D_ref is not None:
            # The last block that came by is the own one.
            slot = lax.rem(within, jnp.int32(stages))
            y = y + D_ref[h] * load(x_s.at[slot], layout).astype(jnp.float32)
        y_s[...] = y.astype(x.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_s, y_ref.at[b, own, h])
        plgpu.wait_smem_to_gmem(0)

    return compat.mosaic_kernel(
        kernel,
        name=name,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(H, L // ROWS, batch),
        grid_names=("head", "block", "row"),
        scratch_types=(
            matrices((ROWS, N), C.dtype),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.int32),
            matrices((stages, ROWS, P), x.dtype),
            matrices((stages, ROWS, N), B.dtype),
            plgpu.SMEM((stages, 2, ROWS), jnp.float32),
            plgpu.SMEM((stages, ROWS), jnp.int32),
            matrices((P, N), states.dtype),
            matrices((ROWS, P), x.dtype),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        ),
        compiler_params=compiler_params(),
    )(x, B, C, rows, pieces.ids, pieces.table, pieces.spans, states, *skip)
