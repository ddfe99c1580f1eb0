"""Backward kernel of keys and values: they stay, and the queries of every head of their group come by."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.attention.blocks import Places, visits
from pallas_kernels.attention.common import (
    ROWS,
    capped,
    filled,
    hide,
    meta,
    now,
    product,
    rows_of,
    slopes,
    when_needed,
)
from pallas_kernels.attention.mosaic_backward import Side, launch, own_rows
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
    """dK and dV in the dtype of q; tiles are [keys, queries]."""
    layout = compat.plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    H, d = q.shape[2:]
    kv_axis, head_axis = (1, 2) if kv_layout == "BTKD" else (2, 1)
    S, K = k.shape[kv_axis], k.shape[head_axis]
    groups = H // K
    block = tiles.dkv_block_q
    q, dout = (rows_of(w, 1, block) for w in (q, dout))
    k, v = (rows_of(w, kv_axis, own_rows(d)) for w in (k, v))
    tile = (ROWS, block)

    def prepare(own):
        places = now(own.rows[0], by_row)

        def step(queries_s, half, second, sums, masked):
            dk, dv = sums
            stats_s, meta_s = queries_s.rows
            scores = capped(product(own.first, queries_s.first), scale, soft_cap)
            lse = load(stats_s.at[0], by_column)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(lse, tile, (1,)))
            # What a later product needs is kept narrow: both gradients and two wide tiles exceed the registers.
            kept = None if soft_cap is None else (weights * slopes(scores, soft_cap)).astype(q.dtype)
            if masked:
                weights = hide(weights, 0.0, when_needed(meta_s, by_column), places, window, 1)
            narrow = weights.astype(q.dtype)
            second.wait()
            dv = mma(dv, narrow, queries_s.second.at[half])
            dweights = product(own.second, queries_s.second)
            second.free()
            shift = load(stats_s.at[1], by_column)
            slope = (narrow if kept is None else kept).astype(jnp.float32)
            dscores = slope * (dweights - lax.broadcast_in_dim(shift, tile, (1,)))
            if masked:
                # Hidden rows may be huge: 0 times infinity would be NaN.
                dscores = jnp.where(narrow.astype(jnp.float32) > 0.0, dscores, 0.0)
            compat.plgpu.commit_smem()
            return mma(dk, dscores.astype(q.dtype), queries_s.first.at[half]), dv

        return step

    dk, dv = launch(
        prepare,
        name="attention_key_gradients",
        own=Side(k, v, kv_layout, (meta(keys),)),
        visiting=Side(q, dout, "BTKD", (filled(stats, queries), meta(queries))),
        visits=visits(queries, keys, block, own_rows(d), window, by_key=True),
        block=block,
        stages=tiles.dkv_stages,
        members=groups,
        head_of=lambda head, member: head * groups + member,
        scales=(scale, 1.0),
        last_first=False,
    )
    return lax.slice_in_dim(dk, 0, S, axis=kv_axis), lax.slice_in_dim(dv, 0, S, axis=kv_axis)
