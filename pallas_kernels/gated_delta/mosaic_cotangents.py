"""The kernel that passes cotangents of states back along the pieces of a row, and through the inverses of the chunks.

As :mod:`pallas_kernels.gated_delta.mosaic_states` the other way round: one warpgroup has 64 value channels of the cotangent,
transposed, in float32 registers from the last chunk of the row to the first; operands are rounded to bfloat16.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels import compat
from pallas_kernels.attention.common import ROWS, compiler_params, full, matrices
from pallas_kernels.mosaic import load, mma
from pallas_kernels.ssd.mosaic_outputs import fading
from pallas_kernels.ssd.pieces import ADDS, CLOSES, LAST, OPENS, SEES, Pieces

# Rows of what is given per token.
LOG, SINCE, UNTIL, READS = range(4)


def pass_cotangents(
    q: BFloat16[Array, "B L H dk"],
    k: BFloat16[Array, "B L H dk"],
    do: BFloat16[Array, "B L Hv dv"],
    inverse: BFloat16[Array, "B Hv L 64"],
    rows: Float[Array, "B Hv 4 L"],
    dfinal: Float[Array, "B n Hv dv dk"],
    pieces: Pieces,
    *,
    stages: int,
) -> tuple[BFloat16[Array, "B L Hv dv"], BFloat16[Array, "B p Hv dv dk"], Float[Array, "B n Hv dv dk"]]:
    """Cotangents of what the inverses are multiplied with, of the state after each piece, and of the initial states.

    Args:
        q: queries.
        k: keys.
        do: cotangents of the outputs.
        inverse: rows of the triangular inverses of the chunks.
        rows: of a token, the log decay, base 2, since the document or the chunk began (``LOG``), by how much a state has
            decayed since (``SINCE``), by how much what the token writes decays until the end of either (``UNTIL``), and
            the second times the strength of the write (``READS``).
        dfinal: cotangents of the states after the pieces that close documents, transposed.
        pieces: where states are kept, of chunks of 64.
        stages: chunks in flight.

    Returns:
        Cotangents of the values less what the state knows of them, times the strengths of the writes; of states [B, p, Hv,
        dv, dk], not written for a piece that does not occur; and of initial states, not written for a document that no
        piece opens.
    """
    B, L, H, dk = k.shape
    Hv, dv = do.shape[2:]
    heads, total = Hv // H, L // ROWS
    pl, plgpu = compat.pl, compat.plgpu
    layout = plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)

    def kernel(q_ref, k_ref, do_ref, inverse_ref, rows_ref, dfinal_ref, ids_ref, table_ref, spans_ref, *refs):
        solved_ref, dstates_ref, dstart_ref, q_s, k_s, do_s, inverse_s, rows_s, ids_s, *own_s = refs
        narrow_s, wide_s, dnew_s, solved_s, entering_s, reads_s, ready, closed = own_s
        b, h, part = (lax.axis_index(name) for name in ("row", "head", "part"))
        g = lax.div(h, jnp.int32(heads))
        own = pl.ds(part * ROWS, ROWS)

        def fetch(step):
            slot, at = lax.rem(step, jnp.int32(stages)), pl.ds((total - 1 - step) * ROWS, ROWS)
            for source, target in (
                (q_ref.at[b, at, g], q_s),
                (k_ref.at[b, at, g], k_s),
                (do_ref.at[b, at, h, own], do_s),
                (inverse_ref.at[b, h, at], inverse_s),
                (rows_ref.at[b, h, :, at], rows_s),
                (ids_ref.at[b, at], ids_s),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

        pl.loop(0, min(total, stages))(fetch)

        def chunk(step, dS):
            slot, c = lax.rem(step, jnp.int32(stages)), total - 1 - step
            plgpu.barrier_wait(ready.at[slot])

            def vector(row, side):
                return load(rows_s.at[slot, row], side)

            # From the outputs of the later tokens of the chunk; what the states add comes piece by piece.
            ids = load(ids_s.at[slot], by_row)
            fade = fading(
                vector(LOG, by_column), vector(LOG, by_row), load(ids_s.at[slot], by_column), ids, 0, 1
            )
            scores = fade * mma(None, k_s.at[slot], q_s.at[slot], transpose_b=True)
            dnew_s[...] = mma(None, scores.astype(k.dtype), do_s.at[slot]).astype(do.dtype)

            first, count = spans_ref[b, c, 0], spans_ref[b, c, 1]

            def piece(back, dS):
                n = first + count - 1 - back
                last, opens, closes = (table_ref[b, n, column] for column in (LAST, OPENS, CLOSES))

                @pl.when(closes >= 0)
                def _close():
                    plgpu.copy_gmem_to_smem(dfinal_ref.at[b, closes, h, own], wide_s, closed)
                    plgpu.barrier_wait(closed)

                dS = lax.cond(closes >= 0, lambda dS: load(wide_s, layout), lambda dS: dS, dS)
                narrow_s[...] = dS.astype(k.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(narrow_s, dstates_ref.at[b, n, h, own])

                def weigh(values, row, column):
                    """Rows of this piece by their factors, the others by zero."""
                    mine = load(ids_s.at[slot], by_row) == table_ref[b, n, column]
                    weight = jnp.where(mine, vector(row, by_row), 0.0)
                    return values * lax.broadcast_in_dim(weight, values.shape, (0,))

                given = weigh(mma(None, k_s.at[slot], narrow_s, transpose_b=True), UNTIL, ADDS)
                # In place: an earlier piece of the chunk finds what the later ones have given to theirs.
                dnew_s[...] = (load(dnew_s, layout).astype(jnp.float32) + given).astype(do.dtype)
                plgpu.commit_smem()
                solved = mma(None, inverse_s.at[slot], dnew_s, transpose_a=True)
                solved_s[...] = solved.astype(do.dtype)
                reads_s[...] = weigh(-solved, READS, SEES).astype(do.dtype)
                seen = load(do_s.at[slot], layout).astype(jnp.float32)
                entering_s[...] = weigh(seen, SINCE, SEES).astype(do.dtype)
                plgpu.commit_smem()
                dS = dS * jnp.where(last >= 0, rows_ref[b, h, SINCE, jnp.maximum(last, 0)], 0.0)
                dS = mma(dS, entering_s, q_s.at[slot], transpose_a=True)
                dS = mma(dS, reads_s, k_s.at[slot], transpose_a=True)

                @pl.when(opens >= 0)
                def _open():
                    wide_s[...] = dS
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(wide_s, dstart_ref.at[b, opens, h, own])

                # Nothing is written again before every warp has read it and the copies have left.
                plgpu.wait_smem_to_gmem(0)
                plgpu.commit_smem()
                return dS

            dS = lax.fori_loop(0, count, piece, dS)
            # After the first piece, when the cotangents of all are known.
            plgpu.copy_smem_to_gmem(solved_s, solved_ref.at[b, pl.ds(c * ROWS, ROWS), h, own])
            pl.when(step + stages < total)(lambda: fetch(step + stages))
            plgpu.wait_smem_to_gmem(0)
            plgpu.commit_smem()
            return dS

        lax.fori_loop(0, total, chunk, full((ROWS, dk), 0.0, layout))

    square = matrices((ROWS, ROWS), do.dtype)
    turned = matrices((ROWS, ROWS), do.dtype, like=dk)
    return compat.mosaic_kernel(
        kernel,
        name="gated_delta_cotangents",
        out_type=(
            jax.ShapeDtypeStruct(do.shape, do.dtype),
            jax.ShapeDtypeStruct((B, pieces.table.shape[1], Hv, dv, dk), do.dtype),
            jax.ShapeDtypeStruct(dfinal.shape, jnp.float32),
        ),
        grid=(dv // ROWS, Hv, B),
        grid_names=("part", "head", "row"),
        scratch_types=(
            matrices((stages, ROWS, dk), q.dtype),
            matrices((stages, ROWS, dk), k.dtype),
            matrices((stages, ROWS, ROWS), do.dtype),
            matrices((stages, ROWS, ROWS), do.dtype),
            plgpu.SMEM((stages, 4, ROWS), jnp.float32),
            plgpu.SMEM((stages, ROWS), jnp.int32),
            matrices((ROWS, dk), do.dtype),
            matrices((ROWS, dk), jnp.float32),
            square,
            square,
            turned,
            turned,
            plgpu.Barrier(num_arrivals=6, num_barriers=stages),
            plgpu.Barrier(),
        ),
        compiler_params=compiler_params(),
    )(q, k, do, inverse, rows, dfinal, pieces.ids, pieces.table, pieces.spans)
