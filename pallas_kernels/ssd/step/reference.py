"""The step row by row, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.slots import slot_ids

REASON = "the oracle of the tests: one row at a time"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, dt, A, B, C, D, *, pool, slots, live, fresh):
    rows, H, _ = x.shape
    fresh = jnp.zeros(rows, bool) if fresh is None else fresh
    dtype = x.dtype
    x, dt, A, B, C = (v.astype(jnp.float32) for v in (x, dt, A, B, C))

    def step(pool, row):
        slot, begins, x, dt, B, C = row
        at, runs = jnp.maximum(slot, 0), slot >= 0
        B, C = (jnp.repeat(v, H // len(v), axis=0) for v in (B, C))
        S = jnp.where(begins, 0, pool[at])
        S = jnp.exp(dt * A)[:, None, None] * S + (dt[:, None] * x)[..., None] * B[:, None]
        y = jnp.einsum("hpn,hn->hp", S, C, precision="highest")
        y = y if D is None else y + D[:, None] * x
        return pool.at[at].set(jnp.where(runs, S, pool[at])), jnp.where(runs, y, 0)

    pool, y = jax.lax.scan(step, pool, (slot_ids(slots, live, rows), fresh, x, dt, B, C))
    return y.astype(dtype), pool
