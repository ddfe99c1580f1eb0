"""The step as a gather, k products and a scatter."""

import jax.numpy as jnp

from pallas_kernels.causal_conv.activation import activate

REASON = "a gather, k products and a scatter by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, weight, bias, *, pool, slots, activation):
    live = slots >= 0
    # A slot past the end: the gather fills with zeros, the scatter drops.
    at = jnp.where(live, slots, len(pool))
    window = pool.at[at].get(mode="fill", fill_value=0)
    x = jnp.where(live[:, None], x, 0)
    weight = weight.astype(jnp.float32)
    y = jnp.sum(window * weight[:-1], axis=1) + x * weight[-1]
    y = activate(y if bias is None else y + bias, activation)
    moved = jnp.concatenate([window[:, 1:], x[:, None].astype(pool.dtype)], axis=1)
    return jnp.where(live[:, None], y, 0).astype(x.dtype), pool.at[at].set(moved, mode="drop")
