"""Backward kernel of the queries: the warpgroups and the ring of forward, dout beside q.

Scores are taken again from q and k, weights from the final log-sum-exp (FlashAttention-2, arXiv 2307.08691). One
warpgroup sums each result in a fixed order, without atomics: two runs agree bit for bit.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.attention.blocks import Places, visits
from pallas_kernels.attention.common import (
    CONSUMERS,
    ROWS,
    capped,
    compiler_params,
    filled,
    full,
    hide,
    key_rows,
    matrices,
    meta,
    parts_of,
    product,
    rows_of,
    slopes,
)
from pallas_kernels.attention.tiles import Tiles
from pallas_kernels.mosaic import load, mma


def query_gradient(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B _ _ d"],
    v: Float[Array, "B _ _ d"],
    dout: Float[Array, "B T H d"],
    stats: Float[Array, "B H 2 T"],
    queries: Places,
    keys: Places,
    *,
    window: int | None,
    soft_cap: float | None,
    scale: float,
    kv_layout: str,
    tiles: Tiles,
) -> Float[Array, "B T H d"]:
    """dQ in the dtype of q.

    Up to d = 128 each warpgroup has 64 queries of its own. Beyond, dQ of 64 queries and two tiles of scores exceed its
    registers: both have the same queries and half of the columns each.
    """
    pl, plgpu = compat.pl, compat.plgpu
    layout = plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    B, T, H, d = q.shape
    kv_axis, head_axis = (1, 2) if kv_layout == "BTKD" else (2, 1)
    groups = H // k.shape[head_axis]
    parts = parts_of(d)
    sets, columns = CONSUMERS // parts, d // parts
    block, stages = tiles.dq_block_kv, tiles.dq_stages
    order, counts = visits(queries, keys, sets * ROWS, block, window)
    blocks = counts.shape[1]
    q, dout = (rows_of(w, 1, sets * ROWS) for w in (q, dout))
    k, v = (rows_of(w, kv_axis, block) for w in (k, v))
    tile = (ROWS, block)

    def part(n):
        return pl.ds(n * columns, columns)

    def kernel(q_ref, k_ref, v_ref, dout_ref, stats_ref, q_meta, kv_meta, order_ref, counts_ref, *rest):
        dq_ref, (q_s, dout_s, k_s, v_s, stats_s, q_meta_s, kv_meta_s), *barriers = rest
        own_in, k_in, v_in, k_free, v_free, done = barriers
        b, h = lax.axis_index("row"), lax.axis_index("head")
        # The last blocks of a causal row visit most keys: they start first.
        i = blocks - 1 - lax.axis_index("block")
        me = lax.axis_index("warpgroup")
        free, total = counts_ref[b, i, 0], counts_ref[b, i, 1]

        def own_rows(n):
            return pl.ds((i * sets + n) * ROWS, ROWS)

        @pl.when(me < CONSUMERS)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            own, half = (me, 0) if parts == 1 else (0, me)
            plgpu.barrier_wait(own_in)
            ids, positions = (load(q_meta_s.at[own, n], by_row) for n in range(2))
            lse, shift = (load(stats_s.at[own, n], by_row) for n in range(2))
            mine = (lambda: ids, lambda: positions)

            def step(n, dq, masked):
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(k_in.at[slot])
                scores = capped(product(q_s.at[own], k_s.at[slot], parts), scale, soft_cap)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(lse, tile, (0,)))
                if masked:
                    other = [partial(load, kv_meta_s.at[slot, n], by_column) for n in range(2)]
                    weights = hide(weights, 0.0, mine, other, window, 0)
                    plgpu.commit_smem()
                weights = weights * slopes(scores, soft_cap)
                plgpu.barrier_wait(v_in.at[slot])
                dweights = product(dout_s.at[own], v_s.at[slot], parts)
                plgpu.barrier_arrive(v_free.at[slot])
                dscores = weights * (dweights - lax.broadcast_in_dim(shift, tile, (0,)))
                if masked:
                    # Hidden rows may be huge: 0 times infinity would be NaN.
                    dscores = jnp.where(weights > 0.0, dscores, 0.0)
                dq = mma(dq, dscores.astype(q.dtype), k_s.at[slot, half])
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            dq = full((ROWS, columns), 0.0, layout)
            dq = lax.fori_loop(0, free, lambda n, c: step(n, c, False), dq)
            dq = lax.fori_loop(free, total, lambda n, c: step(n, c, True), dq)
            # The queries give their place to their gradient once neither warpgroup reads them.
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            q_s[own, half] = (dq * scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[own, half], dq_ref.at[b, own_rows(own), h, part(half)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == CONSUMERS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(h, jnp.int32(groups))
            for s in range(sets):
                rows = own_rows(s)
                for n in range(parts):
                    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h, part(n)], q_s.at[s, n], own_in)
                    plgpu.copy_gmem_to_smem(dout_ref.at[b, rows, h, part(n)], dout_s.at[s, n], own_in)
                plgpu.copy_gmem_to_smem(stats_ref.at[b, h, :, rows], stats_s.at[s], own_in)
                plgpu.copy_gmem_to_smem(q_meta.at[b, :, rows], q_meta_s.at[s], own_in)

            @pl.loop(0, total)
            def _block(n):
                slot = lax.rem(n, jnp.int32(stages))
                rows = pl.ds(order_ref[b, i, n] * block, block)
                again = n >= stages
                pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                for p in range(parts):
                    source = key_rows(k_ref, b, rows, kv_head, kv_layout, part(p))
                    plgpu.copy_gmem_to_smem(source, k_s.at[slot, p], k_in.at[slot])
                plgpu.copy_gmem_to_smem(kv_meta.at[b, :, rows], kv_meta_s.at[slot], k_in.at[slot])
                pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                for p in range(parts):
                    source = key_rows(v_ref, b, rows, kv_head, kv_layout, part(p))
                    plgpu.copy_gmem_to_smem(source, v_s.at[slot, p], v_in.at[slot])

            # Nobody leaves while its barriers are still signalled.
            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _drain(n):
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

    shared: Any = (
        matrices((sets, parts, ROWS, columns), q.dtype),
        matrices((sets, parts, ROWS, columns), q.dtype),
        matrices((stages, parts, block, columns), q.dtype),
        matrices((stages, parts, block, columns), q.dtype),
        plgpu.SMEM((sets, 2, ROWS), jnp.float32),
        plgpu.SMEM((sets, 2, ROWS), jnp.int32),
        plgpu.SMEM((stages, 2, block), jnp.int32),
    )
    dq = compat.mosaic_kernel(
        kernel,
        name="attention_query_gradient",
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(H, blocks, B),
        grid_names=("head", "block", "row"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=(
            shared,
            plgpu.Barrier(num_arrivals=sets * (2 * parts + 2)),
            plgpu.Barrier(num_arrivals=parts + 1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=parts, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ),
        compiler_params=compiler_params(),
    )(q, k, v, dout, filled(stats, queries), meta(queries), meta(keys), order, counts)
    return dq[:, :T]
