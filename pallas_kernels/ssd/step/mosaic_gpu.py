"""The step on Hopper GPUs through Mosaic: a head's state is read once, kept in registers, and written back in place.

A warpgroup takes 64 rows of one head's state. Nothing is shared between warpgroups, so that there is nothing to wait for
but memory: several of them on each multiprocessor keep its loads in flight. An idle row's state is not touched.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.attention.common import LOG2E, ROWS, compiler_params, full
from pallas_kernels.mosaic import load, store
from pallas_kernels.slots import slot_ids

REASON = "states read and written in place, once each, of live rows only"
BESIDE = "nothing, where the pool is donated and the slots are given as -1 where idle"

# Columns of a state; one warpgroup has a whole row of it in registers.
COLUMNS = (64, 128, 256)


def supports(x, _dt, _A, B, C, _D, **_options) -> str | None:
    if x.shape[2] % ROWS:
        return f"P = {x.shape[2]} is not a multiple of {ROWS}"
    if B.shape[2] not in COLUMNS:
        return f"N = {B.shape[2]} is none of {', '.join(map(str, COLUMNS))}"
    for name, v in (("x", x), ("B", B), ("C", C)):
        if v.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} is {v.dtype.name}, neither bfloat16 nor float32"
    return None


def _updated(S: jax.Array, decay: Any, xb: jax.Array, B: jax.Array) -> jax.Array:
    """``decay S + xb B^T`` [64, N]."""
    wide = (lax.broadcast_in_dim(v, S.shape, (axis,)) for axis, v in ((0, xb), (1, B)))
    left, right = wide
    return S * decay + left * right


def run(x, dt, A, B, C, D, *, pool, slots, live, fresh):
    rows, H, P = x.shape
    G, N = B.shape[1:]
    pl = compat.pl
    layout = compat.plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    dt, A, D = (None if v is None else v.astype(jnp.float32) for v in (dt, A, D))
    fresh = None if fresh is None else fresh.astype(jnp.int32)

    def far(ref: Any, layout: Any) -> jax.Array:
        return load(ref, layout, optimized=False).astype(jnp.float32)

    def kernel(given, pool_ref, out):
        x_ref, dt_ref, A_ref, B_ref, C_ref, D_ref, slots_ref, fresh_ref = given
        b, h, part = (lax.axis_index(name) for name in ("row", "head", "part"))
        g = lax.div(h, jnp.int32(H // G))
        own = pl.ds(part * ROWS, ROWS)
        slot = slots_ref[b]

        @pl.when(slot >= 0)
        def _step():
            at = jnp.maximum(slot, 0)
            state = pool_ref.at[at, h, own]
            begins = False if fresh_ref is None else fresh_ref[b] != 0
            S = lax.cond(begins, lambda: full((ROWS, N), 0.0, layout), lambda: far(state, layout))
            step = dt_ref[b, h]
            u = far(x_ref.at[b, h, own], by_row)
            S = _updated(S, jnp.exp2(step * A_ref[h] * LOG2E), u * step, far(B_ref.at[b, g], by_column))
            store(state, S, optimized=False)
            right = lax.broadcast_in_dim(far(C_ref.at[b, g], by_column), S.shape, (1,))
            y = jnp.sum(S * right, axis=1)
            y = y if D_ref is None else y + u * D_ref[h]
            store(out.at[b, h, own], y.astype(x.dtype), optimized=False)

        @pl.when(slot < 0)
        def _idle():
            store(out.at[b, h, own], full((ROWS,), 0.0, by_row).astype(x.dtype), optimized=False)

    return compat.mosaic_in_place(
        kernel,
        (x, dt, A, B, C, D, slot_ids(slots, live, rows), fresh),
        pool,
        name="ssd_step",
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(P // ROWS, H, rows),
        grid_names=("part", "head", "row"),
        compiler_params=compiler_params(),
    )
