"""The step row by row, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv.activation import activate
from pallas_kernels.slots import slot_ids

REASON = "the oracle of the tests: one row at a time"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, weight, bias, *, pool, slots, live, activation):
    weight = weight.astype(jnp.float32)

    def step(pool, row):
        u, slot = row
        at, runs = jnp.maximum(slot, 0), slot >= 0
        taps = jnp.concatenate([pool[at], jnp.where(runs, u, 0)[None]]).astype(jnp.float32)
        y = jnp.sum(weight * taps, axis=0) + (0 if bias is None else bias)
        return pool.at[at].set(jnp.where(runs, taps[1:].astype(pool.dtype), pool[at])), jnp.where(runs, y, 0)

    pool, y = jax.lax.scan(step, pool, (x.astype(jnp.float32), slot_ids(slots, live, len(x))))
    return activate(y, activation).astype(x.dtype), pool
