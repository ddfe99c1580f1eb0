"""The kernel that passes states along the pieces of a row and makes what each token writes: ``T (V - decayed K S)``.

One warpgroup has 64 value channels of a head's state, transposed, in float32 registers from the first chunk of the row to
the last; what it writes for others to multiply with is rounded to bfloat16.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels import compat
from pallas_kernels.attention.common import ROWS, compiler_params, full, matrices
from pallas_kernels.mosaic import load, mma
from pallas_kernels.ssd.pieces import ADDS, CLOSES, LAST, OPENS, SEES, Pieces


def pass_states(
    k: BFloat16[Array, "B L H dk"],
    v: BFloat16[Array, "B L Hv dv"],
    solve: BFloat16[Array, "B Hv L 64"],
    decays: Float[Array, "B Hv 2 L"],
    start: Float[Array, "B n Hv dv dk"],
    pieces: Pieces,
    *,
    stages: int,
    backward: bool,
) -> tuple[Array, ...]:
    """What each token writes, the state before each piece, and the states after the pieces that close them.

    Args:
        k: keys.
        v: values.
        solve: rows of the triangular inverses of the chunks, their columns times the strengths of the writes.
        decays: of a token, by how much a state has decayed since the document or the chunk began, and by how much what
            the token writes decays until the end of either.
        start: states that pieces begin with, transposed.
        pieces: where states are kept, of chunks of 64.
        stages: chunks in flight.
        backward: also what is left of the values without what the states know of them.

    Returns:
        What tokens write [B, L, Hv, dv], states [B, p, Hv, dv, dk], not written for a piece that does not occur, final
        states [B, n, Hv, dv, dk], not written for a document that no piece closes, and with ``backward`` what is left of
        the values [B, L, Hv, dv]; the third is float32, the others are bfloat16.
    """
    B, L, H, dk = k.shape
    Hv, dv = v.shape[2:]
    heads, total = Hv // H, L // ROWS
    pl, plgpu = compat.pl, compat.plgpu
    layout = plgpu.Layout.WGMMA
    by_row = layout.reduce(1)

    def kernel(k_ref, v_ref, solve_ref, decays_ref, start_ref, ids_ref, table_ref, spans_ref, *refs):
        (new_ref, states_ref, final_ref, *left_refs), refs = refs[: 3 + backward], refs[3 + backward :]
        k_s, v_s, solve_s, decays_s, ids_s, *own_s = refs
        narrow_s, wide_s, new_s, scaled_s, ready, began = own_s
        b, h, part = (lax.axis_index(name) for name in ("row", "head", "part"))
        g = lax.div(h, jnp.int32(heads))
        own = pl.ds(part * ROWS, ROWS)

        def fetch(c):
            slot, rows = lax.rem(c, jnp.int32(stages)), pl.ds(c * ROWS, ROWS)
            for source, target in (
                (k_ref.at[b, rows, g], k_s),
                (v_ref.at[b, rows, h, own], v_s),
                (solve_ref.at[b, h, rows], solve_s),
                (decays_ref.at[b, h, :, rows], decays_s),
                (ids_ref.at[b, rows], ids_s),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

        pl.loop(0, min(total, stages))(fetch)

        def chunk(c, S):
            slot = lax.rem(c, jnp.int32(stages))
            plgpu.barrier_wait(ready.at[slot])

            def piece(n, S):
                last, opens, closes = (table_ref[b, n, column] for column in (LAST, OPENS, CLOSES))

                @pl.when(opens >= 0)
                def _open():
                    plgpu.copy_gmem_to_smem(start_ref.at[b, opens, h, own], wide_s, began)
                    plgpu.barrier_wait(began)

                S = lax.cond(opens >= 0, lambda S: load(wide_s, layout), lambda S: S, S)
                narrow_s[...] = S.astype(k.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(narrow_s, states_ref.at[b, n, h, own])

                def weigh(values, row, column):
                    """Rows of this piece by their decays, the others by zero."""
                    mine = load(ids_s.at[slot], by_row) == table_ref[b, n, column]
                    weight = jnp.where(mine, load(decays_s.at[slot, row], by_row), 0.0)
                    return values * lax.broadcast_in_dim(weight, values.shape, (0,))

                read = weigh(mma(None, k_s.at[slot], narrow_s, transpose_b=True), 0, SEES)
                # In place: a later piece of the chunk finds what the earlier ones have left of their values.
                v_s[slot] = (load(v_s.at[slot], layout).astype(jnp.float32) - read).astype(v.dtype)
                plgpu.commit_smem()
                new = mma(None, solve_s.at[slot], v_s.at[slot])
                new_s[...] = new.astype(v.dtype)
                scaled_s[...] = weigh(new, 1, ADDS).astype(v.dtype)
                plgpu.commit_smem()
                S = S * jnp.where(last >= 0, decays_ref[b, h, 0, jnp.maximum(last, 0)], 0.0)
                S = mma(S, scaled_s, k_s.at[slot], transpose_a=True)

                @pl.when(closes >= 0)
                def _close():
                    wide_s[...] = S
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(wide_s, final_ref.at[b, closes, h, own])

                # Nothing is written again before every warp has read it and the copies have left.
                plgpu.wait_smem_to_gmem(0)
                plgpu.commit_smem()
                return S

            first = spans_ref[b, c, 0]
            S = lax.fori_loop(first, first + spans_ref[b, c, 1], piece, S)
            # After the last piece, which knows the reads of all.
            plgpu.copy_smem_to_gmem(new_s, new_ref.at[b, pl.ds(c * ROWS, ROWS), h, own])
            for left_ref in left_refs:
                plgpu.copy_smem_to_gmem(v_s.at[slot], left_ref.at[b, pl.ds(c * ROWS, ROWS), h, own])
                # The next chunk is fetched to where it leaves from.
                plgpu.wait_smem_to_gmem(0)
            pl.when(c + stages < total)(lambda: fetch(c + stages))
            plgpu.wait_smem_to_gmem(0)
            plgpu.commit_smem()
            return S

        lax.fori_loop(0, total, chunk, full((ROWS, dk), 0.0, layout))

    return compat.mosaic_kernel(
        kernel,
        name="gated_delta_states",
        out_type=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((B, pieces.table.shape[1], Hv, dv, dk), v.dtype),
            jax.ShapeDtypeStruct(start.shape, jnp.float32),
            *[jax.ShapeDtypeStruct(v.shape, v.dtype)] * backward,
        ),
        grid=(dv // ROWS, Hv, B),
        grid_names=("part", "head", "row"),
        scratch_types=(
            matrices((stages, ROWS, dk), k.dtype),
            matrices((stages, ROWS, ROWS), v.dtype),
            matrices((stages, ROWS, ROWS), v.dtype),
            plgpu.SMEM((stages, 2, ROWS), jnp.float32),
            plgpu.SMEM((stages, ROWS), jnp.int32),
            matrices((ROWS, dk), v.dtype),
            matrices((ROWS, dk), jnp.float32),
            matrices((ROWS, ROWS), v.dtype),
            matrices((ROWS, ROWS), v.dtype, like=dk),
            plgpu.Barrier(num_arrivals=5, num_barriers=stages),
            plgpu.Barrier(),
        ),
        compiler_params=compiler_params(),
    )(k, v, solve, decays, start, pieces.ids, pieces.table, pieces.spans)
