"""The convolution along every path, one window of inputs per node, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.tree import depths

REASON = "the oracle of the tests: a window of inputs for every node"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, weight, *, ancestors, initial_state):
    """``weight`` [k, D], or [B, W, k, D] where every node has a kernel of its own."""
    rows, W, D = x.shape
    x = x.astype(jnp.float32)

    def step(taps, j):
        """``taps`` [B, W, k, D] end with the ancestors down to ``j``'s depth; ``j`` i32[B]."""
        at = jnp.arange(rows)
        new = jnp.broadcast_to(x[at, j][:, None, None], (rows, W, 1, D))
        shifted = jnp.concatenate([taps[:, :, 1:], new], axis=2)
        return jnp.where(ancestors[at, :, j][:, :, None, None], shifted, taps), None

    start = jnp.pad(initial_state.astype(jnp.float32), ((0, 0), (1, 0), (0, 0)))
    start = jnp.broadcast_to(start[:, None], (rows, W, weight.shape[-2], D))
    taps, _ = jax.lax.scan(step, start, jnp.argsort(depths(ancestors), axis=1).T)
    return jnp.sum(weight * taps, axis=2)
