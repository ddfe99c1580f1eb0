"""The step as the one-token call of the scan, between a read and a write of the slots."""

import jax.numpy as jnp

from pallas_kernels.slots import live_rows, read, write
from pallas_kernels.ssd.xla import one_token

REASON = "one update of the states, fused by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, dt, A, B, C, D, *, pool, slots, live, fresh):
    rows = len(x)
    runs = live_rows(slots, live, rows)
    if runs is not None:
        # With dt = 0 an idle row's state stays as it is, to the bit.
        x, dt, B, C = (jnp.where(runs.reshape(rows, *[1] * (v.ndim - 1)), v, 0) for v in (x, dt, B, C))
    state = read(pool, slots, live, rows)
    if fresh is not None:
        begins = fresh if runs is None else fresh & runs
        state = jnp.where(begins[:, None, None, None], 0, state)
    A, D = A.astype(jnp.float32), None if D is None else D.astype(jnp.float32)
    y, state = one_token(x, dt, A, B, C, D, state)
    return y.astype(x.dtype), write(pool, slots, live, state)
