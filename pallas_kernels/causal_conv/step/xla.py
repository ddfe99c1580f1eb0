"""The step as the one-token call of the convolution, between a read and a write of the slots."""

import jax.numpy as jnp

from pallas_kernels.causal_conv.xla import one_token
from pallas_kernels.slots import live_rows, read, write

REASON = "k products between a read and a write of the slots, by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, weight, bias, *, pool, slots, live, activation):
    runs = live_rows(slots, live, len(x))
    ids = None if runs is None else runs[:, None].astype(jnp.int32)
    window = read(pool, slots, live, len(x))[:, None]
    weight, bias = weight.astype(jnp.float32), None if bias is None else bias.astype(jnp.float32)
    y, state = one_token(x[:, None], weight, bias, ids, window, activation)
    return y[:, 0].astype(x.dtype), write(pool, slots, live, state[:, 0])
