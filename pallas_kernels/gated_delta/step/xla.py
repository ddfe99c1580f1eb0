"""The step as the one-token call of the rule, between a read and a write of the slots."""

import jax.numpy as jnp

from pallas_kernels.gated_delta.xla import one_token
from pallas_kernels.slots import live_rows, read, write

REASON = "one update of the states, fused by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def run(q, k, v, g, beta, *, pool, slots, live, fresh):
    rows = len(q)
    runs = live_rows(slots, live, rows)
    if runs is not None:
        # With g = beta = 0 an idle row's state stays as it is, to the bit.
        q, k, v, g, beta = (
            jnp.where(runs.reshape(rows, *[1] * (x.ndim - 1)), x, 0) for x in (q, k, v, g, beta)
        )
    state = read(pool, slots, live, rows)
    if fresh is not None:
        begins = fresh if runs is None else fresh & runs
        state = jnp.where(begins[:, None, None, None], 0, state)
    o, state = one_token(q, k, v, g, beta, state)
    return o.astype(v.dtype), write(pool, slots, live, state)
