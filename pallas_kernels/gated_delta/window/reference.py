"""The recurrence along every path, one state per node, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.tree import depths

REASON = "the oracle of the tests: a state for every node"


def supports(*_args, **_options) -> str | None:
    return None


def run(q, k, v, g, beta, *, ancestors, initial_state):
    rows, W, H, _ = q.shape
    q, k = (jnp.repeat(x, v.shape[2] // H, axis=2) for x in (q, k))

    def step(carry, j):
        """``states`` [B, W, Hv, dk, dv] after the ancestors that lie above ``j``'s depth; ``j`` i32[B]."""
        states, write = carry
        at = jnp.arange(rows)
        decayed = jnp.exp(g[at, j])[:, None, :, None, None] * states
        own = decayed[at, j]
        held = jnp.einsum("bhkv,bhk->bhv", own, k[at, j], precision="highest")
        w = beta[at, j][..., None] * (v[at, j] - held)
        new = decayed + (k[at, j][..., None] * w[:, :, None])[:, None]
        states = jnp.where(ancestors[at, :, j][:, :, None, None, None], new, states)
        return (states, write.at[at, j].set(w)), None

    start = jnp.broadcast_to(initial_state[:, None], (rows, W, *initial_state.shape[1:]))
    order = jnp.argsort(depths(ancestors), axis=1).T
    (states, write), _ = jax.lax.scan(step, (start, jnp.zeros_like(v)), order)
    return jnp.einsum("bihkv,bihk->bihv", states, q, precision="highest"), write
