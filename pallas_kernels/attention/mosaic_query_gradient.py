"""Backward kernel of the queries: they stay, and the keys and values that they see come by."""

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
    """dQ in the dtype of q; tiles are [queries, keys]."""
    layout = compat.plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    T, H, d = q.shape[1:]
    kv_axis, head_axis = (1, 2) if kv_layout == "BTKD" else (2, 1)
    groups = H // k.shape[head_axis]
    block = tiles.dq_block_kv
    q, dout = (rows_of(w, 1, own_rows(d)) for w in (q, dout))
    k, v = (rows_of(w, kv_axis, block) for w in (k, v))
    tile = (ROWS, block)

    def prepare(own):
        stats_s, meta_s = own.rows
        places = now(meta_s, by_row)
        lse, shift = (load(stats_s.at[n], by_row) for n in range(2))

        def step(keys_s, half, second, sums, masked):
            scores = capped(product(own.first, keys_s.first), scale, soft_cap)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(lse, tile, (0,)))
            if masked:
                other = when_needed(keys_s.rows[0], by_column)
                weights = hide(weights, 0.0, places, other, window, 0)
                compat.plgpu.commit_smem()
            weights = weights * slopes(scores, soft_cap)
            second.wait()
            dweights = product(own.second, keys_s.second)
            second.free()
            dscores = weights * (dweights - lax.broadcast_in_dim(shift, tile, (0,)))
            if masked:
                # Hidden rows may be huge: 0 times infinity would be NaN.
                dscores = jnp.where(weights > 0.0, dscores, 0.0)
            return (mma(sums[0], dscores.astype(q.dtype), keys_s.first.at[half]),)

        return step

    (dq,) = launch(
        prepare,
        name="attention_query_gradient",
        own=Side(q, dout, "BTKD", (filled(stats, queries), meta(queries))),
        visiting=Side(k, v, kv_layout, (meta(keys),)),
        visits=visits(queries, keys, own_rows(d), block, window),
        block=block,
        stages=tiles.dq_stages,
        members=None,
        head_of=lambda head, _: lax.div(head, jnp.int32(groups)),
        scales=(scale,),
        # The last blocks of a causal row visit most keys: they start first.
        last_first=True,
    )
    return dq[:, :T]
