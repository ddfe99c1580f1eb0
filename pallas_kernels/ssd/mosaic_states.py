"""The kernel that passes states along the pieces of a row, or their cotangents back: ``S <- decay S + left^T right``.

One warpgroup has 64 rows of a head's state, in float32 registers from the first piece of the row to the last; what it
writes for others to multiply with is rounded to bfloat16.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels import compat
from pallas_kernels.attention.common import ROWS, compiler_params, full, matrices
from pallas_kernels.mosaic import load, mma
from pallas_kernels.ssd.pieces import ADDS, CHUNK, CLOSES, LAST, OPENS, PIECE
from pallas_kernels.ssd.tiles import Tiles


def pass_states(
    left: BFloat16[Array, "B L H P"],
    right: BFloat16[Array, "B L G N"],
    weights: Float[Array, "B H L"],
    decays: Float[Array, "B H L"],
    start: Float[Array, "B n H P N"],
    ids: Int[Array, "B L"],
    table: Int[Array, "B p 7"],
    counts: Int[Array, "B"],
    *,
    chunk: int,
    tiles: Tiles,
) -> tuple[BFloat16[Array, "B p H P N"], Float[Array, "B n H P N"]]:
    """The state before each piece, and the states of ``start`` after the pieces that close them.

    Args:
        left: x, or the cotangent of y.
        right: B, or C.
        weights: factor of each token's contribution to the state.
        decays: of a token, by how much a state has decayed since the piece began.
        start: states that pieces begin with.
        ids: document of each token.
        table: the pieces in their order; rows beyond ``counts`` are not read.
        counts: pieces of each row.
        chunk: tokens of a chunk.
        tiles: sizes.

    Returns:
        States [B, p, H, P, N], not written for a piece that does not occur, and final states, not written for a document
        that no piece closes.
    """
    B, _, H, P = left.shape
    G, N = right.shape[2:]
    blocks, stages, heads = chunk // ROWS, tiles.state_stages, H // G
    pl, plgpu = compat.pl, compat.plgpu
    layout = plgpu.Layout.WGMMA
    by_row = layout.reduce(1)

    def kernel(
        left_ref, right_ref, weights_ref, decays_ref, start_ref, ids_ref, table_ref, counts_ref, *refs
    ):
        (
            states_ref,
            final_ref,
            left_s,
            right_s,
            weights_s,
            ids_s,
            scaled_s,
            narrow_s,
            wide_s,
            ready,
            began,
        ) = refs
        b, h, part = (lax.axis_index(name) for name in ("row", "head", "part"))
        g = lax.div(h, jnp.int32(heads))
        own = pl.ds(part * ROWS, ROWS)
        total = counts_ref[b]

        def fetch(n):
            slot = lax.rem(n, jnp.int32(stages))
            first = table_ref[b, n, CHUNK] * chunk
            for k in range(blocks):
                rows = pl.ds(first + k * ROWS, ROWS)
                for source, target in (
                    (left_ref.at[b, rows, h, own], left_s),
                    (right_ref.at[b, rows, g], right_s),
                    (weights_ref.at[b, h, rows], weights_s),
                    (ids_ref.at[b, rows], ids_s),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[slot, k], ready.at[slot])

        @pl.loop(0, jnp.minimum(total, stages))
        def _first(n):
            fetch(n)

        def step(n, S):
            slot = lax.rem(n, jnp.int32(stages))
            piece, adds = table_ref[b, n, PIECE], table_ref[b, n, ADDS]
            last, opens, closes = (table_ref[b, n, column] for column in (LAST, OPENS, CLOSES))

            @pl.when(opens >= 0)
            def _open():
                plgpu.copy_gmem_to_smem(start_ref.at[b, opens, h, own], wide_s, began)
                plgpu.barrier_wait(began)

            S = lax.cond(opens >= 0, lambda S: load(wide_s, layout), lambda S: S, S)
            narrow_s[...] = S.astype(left.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(narrow_s, states_ref.at[b, piece, h, own])
            S = S * jnp.where(last >= 0, decays_ref[b, h, jnp.maximum(last, 0)], 0.0)
            plgpu.barrier_wait(ready.at[slot])
            for k in range(blocks):
                weight = load(weights_s.at[slot, k], by_row)
                weight = jnp.where(load(ids_s.at[slot, k], by_row) == adds, weight, 0.0)
                block = load(left_s.at[slot, k], layout).astype(jnp.float32)
                scaled = block * lax.broadcast_in_dim(weight, block.shape, (0,))
                scaled_s[k] = scaled.astype(left.dtype)
            plgpu.commit_smem()
            for k in range(blocks):
                S = mma(S, scaled_s.at[k], right_s.at[slot, k], transpose_a=True)

            @pl.when(closes >= 0)
            def _close():
                wide_s[...] = S
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(wide_s, final_ref.at[b, closes, h, own])

            # Nothing is written again before every warp has read it and the copies have left.
            plgpu.wait_smem_to_gmem(0)
            plgpu.commit_smem()
            pl.when(n + stages < total)(lambda: fetch(n + stages))
            return S

        lax.fori_loop(0, total, step, full((ROWS, N), 0.0, layout))

    pieces = table.shape[1]
    return compat.mosaic_kernel(
        kernel,
        name="ssd_states",
        out_type=(
            jax.ShapeDtypeStruct((B, pieces, H, P, N), left.dtype),
            jax.ShapeDtypeStruct(start.shape, jnp.float32),
        ),
        grid=(P // ROWS, H, B),
        grid_names=("part", "head", "row"),
        scratch_types=(
            matrices((stages, blocks, ROWS, ROWS), left.dtype),
            matrices((stages, blocks, ROWS, N), right.dtype),
            plgpu.SMEM((stages, blocks, ROWS), jnp.float32),
            plgpu.SMEM((stages, blocks, ROWS), jnp.int32),
            matrices((blocks, ROWS, ROWS), left.dtype),
            matrices((ROWS, N), left.dtype),
            matrices((ROWS, N), jnp.float32),
            plgpu.Barrier(num_arrivals=4 * blocks, num_barriers=stages),
            plgpu.Barrier(),
        ),
        compiler_params=compiler_params(),
    )(left, right, weights, decays, start, ids, table, counts)
