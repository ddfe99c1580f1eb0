"""The step on Hopper GPUs through Mosaic: a head's state is read once, kept in registers, and written back in place.

A warpgroup takes 64 value channels of one head's state: channels never meet, so that nothing is shared between warpgroups,
and there is nothing to wait for but memory. All keys of a channel lie within one warp, so that what the state knows of a
key is summed without shared memory as well. An idle row's state is not touched.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.attention.common import LOG2E, ROWS, compiler_params, full
from pallas_kernels.mosaic import cast_layout, load, store
from pallas_kernels.slots import slot_ids

REASON = "states read and written in place, once each, of live rows only"
BESIDE = "nothing, where the pool is donated and the slots are given as -1 where idle"


def supports(q, k, v, _g, _beta, **_options) -> str | None:
    dk, dv = q.shape[2], v.shape[2]
    if dk % 8 or not 64 <= dk <= 256:
        return f"dk = {dk} is no multiple of 8 from 64 to 256"
    if dv % ROWS or not 64 <= dv <= 256:
        return f"dv = {dv} is no multiple of {ROWS} from 64 to 256"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} is {x.dtype.name}, neither bfloat16 nor float32"
    return None


def _by_channel() -> Any:
    """The layout of [dk, 64]: a warp has 16 channels; its lanes four of them in 8 keys, the other keys are registers."""
    tiling = compat.fragments.Tiling(((8, 64), (16,), (4,)))
    return compat.plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-4, -2), vector_dim=-1)


def _along(S: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """``x`` along an axis of S; no layout is inferred from its own."""
    return cast_layout(lax.broadcast_in_dim(x, S.shape, (axis,)), _by_channel())


def _read(S: jax.Array, k: jax.Array) -> jax.Array:
    """``S^T k`` [64]."""
    return jnp.sum(S * _along(S, k, 0), axis=0)


def _updated(S: jax.Array, k: jax.Array, write: jax.Array) -> jax.Array:
    """``S + k write^T`` [dk, 64]."""
    return S + _along(S, k, 0) * _along(S, write, 1)


def run(q, k, v, g, beta, *, pool, slots, live, fresh):
    rows, H, dk = q.shape
    Hv, dv = v.shape[1:]
    pl = compat.pl
    layout = _by_channel()
    by_key, by_value = layout.reduce(1), layout.reduce(0)
    g, beta = g.astype(jnp.float32), beta.astype(jnp.float32)
    fresh = None if fresh is None else fresh.astype(jnp.int32)

    def far(ref: Any, layout: Any) -> jax.Array:
        return load(ref, layout, optimized=False).astype(jnp.float32)

    def kernel(given, pool_ref, out):
        q_ref, k_ref, v_ref, g_ref, beta_ref, slots_ref, fresh_ref = given
        b, e, part = (lax.axis_index(name) for name in ("row", "head", "part"))
        h = lax.div(e, jnp.int32(Hv // H))
        own = pl.ds(part * ROWS, ROWS)
        slot = slots_ref[b]

        @pl.when(slot >= 0)
        def _step():
            state = pool_ref.at[jnp.maximum(slot, 0), e, :, own]
            begins = False if fresh_ref is None else fresh_ref[b] != 0
            S = lax.cond(begins, lambda: full((dk, ROWS), 0.0, layout), lambda: far(state, layout))
            S = S * jnp.exp2(g_ref[b, e] * LOG2E)
            key = far(k_ref.at[b, h], by_key)
            S = _updated(S, key, beta_ref[b, e] * (far(v_ref.at[b, e, own], by_value) - _read(S, key)))
            store(state, S, optimized=False)
            o = _read(S, far(q_ref.at[b, h], by_key))
            store(out.at[b, e, own], o.astype(v.dtype), optimized=False)

        @pl.when(slot < 0)
        def _idle():
            store(out.at[b, e, own], full((ROWS,), 0.0, by_value).astype(v.dtype), optimized=False)

    return compat.mosaic_in_place(
        kernel,
        (q, k, v, g, beta, slot_ids(slots, live, rows), fresh),
        pool,
        name="gated_delta_step",
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        grid=(dv // ROWS, Hv, rows),
        grid_names=("part", "head", "row"),
        compiler_params=compiler_params(),
    )
