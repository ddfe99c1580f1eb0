"""Backward kernel of keys and values: they stay, and the queries of every head of their group come by.

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


def key_gradients(
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
) -> tuple[Float[Array, "B _ _ d"], Float[Array, "B _ _ d"]]:
    """dK and dV: keys stay, the queries of every head of the group come by; tiles are [keys, queries].

    Up to d = 128 each warpgroup has 64 keys of its own. Beyond, dK and dV of 64 keys exceed its registers: both have the
    same keys and half of the columns each.
    """
    pl, plgpu = compat.pl, compat.plgpu
    layout = plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    B, _, H, d = q.shape
    kv_axis, head_axis = (1, 2) if kv_layout == "BTKD" else (2, 1)
    S, K = k.shape[kv_axis], k.shape[head_axis]
    groups = H // K
    parts = parts_of(d)
    sets, columns = CONSUMERS // parts, d // parts
    block, stages = tiles.dkv_block_q, tiles.dkv_stages
    order, counts = visits(queries, keys, block, sets * ROWS, window, by_key=True)
    blocks = counts.shape[1]
    q, dout = (rows_of(w, 1, block) for w in (q, dout))
    k, v = (rows_of(w, kv_axis, sets * ROWS) for w in (k, v))
    tile = (ROWS, block)

    def part(n):
        return pl.ds(n * columns, columns)

    def kernel(q_ref, k_ref, v_ref, dout_ref, stats_ref, q_meta, kv_meta, order_ref, counts_ref, *rest):
        dk_ref, dv_ref, (k_s, v_s, q_s, dout_s, kv_meta_s, q_meta_s, stats_s), *barriers = rest
        own_in, q_in, dout_in, q_free, dout_free, done = barriers
        b, kv_head, i = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("block")
        me = lax.axis_index("warpgroup")
        free, total = counts_ref[b, i, 0], counts_ref[b, i, 1]
        # Every head of the group goes over the wholly visible blocks, then every head over the others.
        clear, steps = groups * free, groups * total

        def at(ref, rows, p):
            return key_rows(ref, b, rows, kv_head, kv_layout, part(p))

        def own_rows(n):
            return pl.ds((i * sets + n) * ROWS, ROWS)

        @pl.when(me < CONSUMERS)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            own, half = (me, 0) if parts == 1 else (0, me)
            plgpu.barrier_wait(own_in)
            ids, positions = (load(kv_meta_s.at[own, n], by_row) for n in range(2))
            keys_of = (lambda: ids, lambda: positions)

            def step(n, carry, masked):
                dk, dv = carry
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(q_in.at[slot])
                scores = capped(product(k_s.at[own], q_s.at[slot], parts), scale, soft_cap)
                lse = load(stats_s.at[slot, 0], by_column)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(lse, tile, (1,)))
                # What a later product needs is kept narrow: both gradients and two wide tiles exceed the registers.
                kept = None if soft_cap is None else (weights * slopes(scores, soft_cap)).astype(q.dtype)
                if masked:
                    other = [partial(load, q_meta_s.at[slot, n], by_column) for n in range(2)]
                    weights = hide(weights, 0.0, other, keys_of, window, 1)
                narrow = weights.astype(q.dtype)
                plgpu.barrier_wait(dout_in.at[slot])
                dv = mma(dv, narrow, dout_s.at[slot, half])
                dweights = product(v_s.at[own], dout_s.at[slot], parts)
                plgpu.barrier_arrive(dout_free.at[slot])
                shift = load(stats_s.at[slot, 1], by_column)
                slope = (narrow if kept is None else kept).astype(jnp.float32)
                dscores = slope * (dweights - lax.broadcast_in_dim(shift, tile, (1,)))
                if masked:
                    # Hidden rows may be huge: 0 times infinity would be NaN.
                    dscores = jnp.where(narrow.astype(jnp.float32) > 0.0, dscores, 0.0)
                plgpu.commit_smem()
                dk = mma(dk, dscores.astype(q.dtype), q_s.at[slot, half])
                plgpu.barrier_arrive(q_free.at[slot])
                return dk, dv

            carry = (full((ROWS, columns), 0.0, layout), full((ROWS, columns), 0.0, layout))
            carry = lax.fori_loop(0, clear, lambda n, c: step(n, c, False), carry)
            dk, dv = lax.fori_loop(clear, steps, lambda n, c: step(n, c, True), carry)
            # Keys and values give their place to their gradients once neither warpgroup reads them.
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            k_s[own, half] = (dk * scale).astype(q.dtype)
            v_s[own, half] = dv.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_s.at[own, half], at(dk_ref, own_rows(own), half))
            plgpu.copy_smem_to_gmem(v_s.at[own, half], at(dv_ref, own_rows(own), half))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == CONSUMERS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")
            for s in range(sets):
                for n in range(parts):
                    plgpu.copy_gmem_to_smem(at(k_ref, own_rows(s), n), k_s.at[s, n], own_in)
                    plgpu.copy_gmem_to_smem(at(v_ref, own_rows(s), n), v_s.at[s, n], own_in)
                plgpu.copy_gmem_to_smem(kv_meta.at[b, :, own_rows(s)], kv_meta_s.at[s], own_in)

            def fetch(n, place, head):
                slot = lax.rem(n, jnp.int32(stages))
                rows = pl.ds(order_ref[b, i, place] * block, block)
                h = kv_head * groups + head
                again = n >= stages
                pl.when(again)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(q_meta.at[b, :, rows], q_meta_s.at[slot], q_in.at[slot])
                plgpu.copy_gmem_to_smem(stats_ref.at[b, h, :, rows], stats_s.at[slot], q_in.at[slot])
                for p in range(parts):
                    source = q_ref.at[b, rows, h, part(p)]
                    plgpu.copy_gmem_to_smem(source, q_s.at[slot, p], q_in.at[slot])
                pl.when(again)(lambda: plgpu.barrier_wait(dout_free.at[slot]))
                for p in range(parts):
                    source = dout_ref.at[b, rows, h, part(p)]
                    plgpu.copy_gmem_to_smem(source, dout_s.at[slot, p], dout_in.at[slot])

            @pl.loop(0, clear)
            def _clear(n):
                fetch(n, lax.rem(n, free), lax.div(n, free))

            @pl.loop(clear, steps)
            def _masked(n):
                fetch(n, free + lax.rem(n - clear, total - free), lax.div(n - clear, total - free))

            # Nobody leaves while its barriers are still signalled.
            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _drain(n):
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(q_free.at[slot])
                plgpu.barrier_wait(dout_free.at[slot])

    shared: Any = (
        matrices((sets, parts, ROWS, columns), q.dtype),
        matrices((sets, parts, ROWS, columns), q.dtype),
        matrices((stages, parts, block, columns), q.dtype),
        matrices((stages, parts, block, columns), q.dtype),
        plgpu.SMEM((sets, 2, ROWS), jnp.int32),
        plgpu.SMEM((stages, 2, block), jnp.int32),
        plgpu.SMEM((stages, 2, block), jnp.float32),
    )
    grads = jax.ShapeDtypeStruct(k.shape, k.dtype)
    dk, dv = compat.mosaic_kernel(
        kernel,
        name="attention_key_gradients",
        out_type=(grads, grads),
        grid=(K, blocks, B),
        grid_names=("head", "block", "row"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=(
            shared,
            plgpu.Barrier(num_arrivals=sets * (2 * parts + 1)),
            plgpu.Barrier(num_arrivals=parts + 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=parts, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ),
        compiler_params=compiler_params(),
    )(q, k, v, dout, filled(stats, queries), meta(queries), meta(keys), order, counts)
    return lax.slice_in_dim(dk, 0, S, axis=kv_axis), lax.slice_in_dim(dv, 0, S, axis=kv_axis)
