"""Forward kernel: two warpgroups of 64 queries over a ring of key and value blocks that a third one fetches.

FlashAttention-3's division of labour (arXiv 2407.08608): the copy engine fills the ring, the tensor cores take both
products with the weights in registers, and the two warpgroups alternate between products and softmax.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.attention.blocks import Places, visits
from pallas_kernels.attention.common import (
    CONSUMERS,
    LEAST,
    LOG2E,
    ROWS,
    capped,
    compiler_params,
    full,
    hide,
    key_rows,
    matrices,
    meta,
    now,
    rows_of,
    when_needed,
)
from pallas_kernels.attention.tiles import Tiles
from pallas_kernels.mosaic import mma


def forward(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B _ _ d"],
    v: Float[Array, "B _ _ d"],
    queries: Places,
    keys: Places,
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
    kv_layout: str,
    tiles: Tiles,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B H T"]]:
    """Output and log-sum-exp of bfloat16 operands; ``queries`` and ``keys`` are whole to this kernel's blocks."""
    B, T, H, d = q.shape
    kv_axis, head_axis = (1, 2) if kv_layout == "BTKD" else (2, 1)
    groups = H // k.shape[head_axis]
    block, stages = tiles.block_kv, tiles.stages
    pl, plgpu = compat.pl, compat.plgpu
    tile_layout = plgpu.Layout.WGMMA
    by_row, by_column = tile_layout.reduce(1), tile_layout.reduce(0)
    order, counts = visits(queries, keys, CONSUMERS * ROWS, block, window)
    blocks = counts.shape[1]
    q = rows_of(q, 1, CONSUMERS * ROWS)
    k, v = (rows_of(w, kv_axis, block) for w in (k, v))
    tile = (ROWS, block)
    q_places, kv_places = meta(queries), meta(keys)
    fields = q_places.shape[1]

    def kernel(q_ref, k_ref, v_ref, q_meta, kv_meta, order_ref, counts_ref, out_ref, lse_ref, *scratch):
        (q_s, k_s, v_s, q_meta_s, kv_meta_s, lse_s), (q_in, k_in, v_in), (k_free, v_free), turn = scratch
        b, h = lax.axis_index("row"), lax.axis_index("head")
        # The last blocks of a causal row visit most keys: they start first.
        i = blocks - 1 - lax.axis_index("block")
        me = lax.axis_index("warpgroup")
        free, total = counts_ref[b, i, 0], counts_ref[b, i, 1]

        def take_turns():
            if tiles.alternate:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        @pl.when(me < CONSUMERS)
        def _attend():
            plgpu.set_max_registers(232, action="increase")
            rows = pl.ds((i * CONSUMERS + me) * ROWS, ROWS)
            mine = q_s.at[me]
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], mine, q_in.at[me])
            plgpu.copy_gmem_to_smem(q_meta.at[b, :, rows], q_meta_s.at[me], q_in.at[me])
            plgpu.barrier_wait(q_in.at[me])
            own = now(q_meta_s.at[me], by_row)

            def step(n, carry, masked):
                out, peak, total = carry
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(k_in.at[slot])
                scores = mma(None, mine, k_s.at[slot], transpose_b=True)
                take_turns()
                scores = capped(scores, scale, soft_cap)
                if masked:
                    other = when_needed(kv_meta_s.at[slot], by_column)
                    scores = hide(scores, -jnp.inf, own, other, window, 0)
                    plgpu.commit_smem()
                plgpu.barrier_arrive(k_free.at[slot])
                higher = jnp.maximum(peak, scores.max(axis=1))
                weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, tile, (0,)))
                decay = jnp.exp2(peak - higher)
                total = total * decay + weights.sum(axis=1)
                out = out * lax.broadcast_in_dim(decay, out.shape, (0,))
                plgpu.barrier_wait(v_in.at[slot])
                take_turns()
                out = mma(out, weights.astype(q.dtype), v_s.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return out, higher, total

            carry = (
                full((ROWS, d), 0.0, tile_layout),
                full((ROWS,), LEAST, by_row),
                full((ROWS,), 0.0, by_row),
            )
            # The second warpgroup is half a step behind the first.
            pl.when(me == 1)(take_turns)
            carry = lax.fori_loop(0, free, lambda n, c: step(n, c, False), carry)
            out, peak, sums = lax.fori_loop(free, total, lambda n, c: step(n, c, True), carry)
            pl.when(me == 0)(take_turns)
            some = sums > 0
            share = jnp.where(some, 1.0 / jnp.where(some, sums, 1.0), 0.0)
            mine[...] = (out * lax.broadcast_in_dim(share, out.shape, (0,))).astype(q.dtype)
            lse_s[me] = jnp.where(some, (peak + jnp.log2(jnp.where(some, sums, 1.0))) / LOG2E, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_ref.at[b, rows, h])
            plgpu.copy_smem_to_gmem(lse_s.at[me], lse_ref.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == CONSUMERS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(h, jnp.int32(groups))

            @pl.loop(0, total)
            def _block(n):
                slot = lax.rem(n, jnp.int32(stages))
                rows = pl.ds(order_ref[b, i, n] * block, block)
                again = n >= stages

                pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(
                    key_rows(k_ref, b, rows, kv_head, kv_layout), k_s.at[slot], k_in.at[slot]
                )
                plgpu.copy_gmem_to_smem(kv_meta.at[b, :, rows], kv_meta_s.at[slot], k_in.at[slot])
                pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                plgpu.copy_gmem_to_smem(
                    key_rows(v_ref, b, rows, kv_head, kv_layout), v_s.at[slot], v_in.at[slot]
                )

            # Nobody leaves while its barriers are still signalled.
            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _drain(n):
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

    out, lse = compat.mosaic_kernel(
        kernel,
        name="attention_forward",
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, H, blocks * CONSUMERS * ROWS), jnp.float32),
        ),
        grid=(H, blocks, B),
        grid_names=("head", "block", "row"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=(
            (
                matrices((CONSUMERS, ROWS, d), q.dtype),
                matrices((stages, block, d), q.dtype),
                matrices((stages, block, d), q.dtype),
                plgpu.SMEM((CONSUMERS, fields, ROWS), jnp.int32),
                plgpu.SMEM((stages, fields, block), jnp.int32),
                plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
            ),
            (plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),) * 2,
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ),
        compiler_params=compiler_params(),
    )(q, k, v, q_places, kv_places, order, counts)
    return out[:, :T], lse[:, :, :T]
