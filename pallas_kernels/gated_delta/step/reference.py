"""The step row by row, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.slots import slot_ids

REASON = "the oracle of the tests: one row at a time"


def supports(*_args, **_options) -> str | None:
    return None


def run(q, k, v, g, beta, *, pool, slots, live, fresh):
    rows, Hv, _ = v.shape
    fresh = jnp.zeros(rows, bool) if fresh is None else fresh
    dtype = v.dtype
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))

    def step(pool, row):
        slot, begins, q, k, v, g, beta = row
        at, runs = jnp.maximum(slot, 0), slot >= 0
        q, k = (jnp.repeat(x, Hv // len(x), axis=0) for x in (q, k))
        S = jnp.exp(g)[:, None, None] * jnp.where(begins, 0, pool[at])
        write = beta[:, None] * (v - jnp.einsum("hkv,hk->hv", S, k, precision="highest"))
        S = S + k[..., None] * write[:, None]
        o = jnp.einsum("hkv,hk->hv", S, q, precision="highest")
        return pool.at[at].set(jnp.where(runs, S, pool[at])), jnp.where(runs, o, 0)

    pool, o = jax.lax.scan(step, pool, (slot_ids(slots, live, rows), fresh, q, k, v, g, beta))
    return o.astype(dtype), pool
