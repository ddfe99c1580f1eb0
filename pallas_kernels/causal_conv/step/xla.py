"""The step as k products between a read and a write of the slots."""

import jax.numpy as jnp

from pallas_kernels.causal_conv.activation import activate
from pallas_kernels.slots import live_rows, read, write

REASON = "k products between a read and a write of the slots, by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, weight, bias, *, pool, slots, live, activation):
    runs = live_rows(slots, live, len(x))
    window = read(pool, slots, live, len(x))
    weight = weight.astype(jnp.float32)
    y = jnp.sum(window * weight[:-1], axis=1) + x * weight[-1]
    y = activate(y if bias is None else y + bias, activation)
    moved = jnp.concatenate([window[:, 1:], x[:, None].astype(pool.dtype)], axis=1)
    if runs is not None:
        y = jnp.where(runs[:, None], y, 0)
        moved = jnp.where(runs[:, None, None], moved, window)
    return y.astype(x.dtype), write(pool, slots, live, moved)
