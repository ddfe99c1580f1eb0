"""The recurrence along every path, one state per node, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.tree import depths

REASON = "the oracle of the tests: a state for every node"


def supports(*_args, **_options) -> str | None:
    return None


def run(factors, a, C, *, ancestors, initial_state):
    xb, B, _ = factors
    rows, W, H, _ = xb.shape
    B, C = (jnp.repeat(v, H // v.shape[2], axis=2) for v in (B, C))

    def step(states, j):
        """``states`` [B, W, H, P, N] after the ancestors that lie above ``j``'s depth; ``j`` i32[B]."""
        at, b = jnp.arange(rows), jnp.exp(a[jnp.arange(rows), j])
        new = b[:, None, :, None, None] * states + (xb[at, j][..., None] * B[at, j][:, :, None])[:, None]
        return jnp.where(ancestors[at, :, j][:, :, None, None, None], new, states), None

    start = jnp.broadcast_to(initial_state[:, None], (rows, W, *initial_state.shape[1:]))
    states, _ = jax.lax.scan(step, start, jnp.argsort(depths(ancestors), axis=1).T)
    return jnp.einsum("bihpn,bihn->bihp", states, C, precision="highest")
