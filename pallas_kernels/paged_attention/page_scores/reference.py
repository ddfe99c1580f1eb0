"""The bound channel by channel, in float32."""

import jax.numpy as jnp

REASON = "the oracle of the tests: every channel's bound written out"


def supports(*_args, **_options) -> str | None:
    return None


def run(q, page_min, page_max, *, table, num_pages, reduce):
    B, H, d = q.shape
    P, K, _ = page_min.shape
    n = table.shape[2]
    at = (jnp.clip(table, 0, P - 1), jnp.arange(K)[:, None])
    low, high = (w[at].astype(jnp.float32)[:, :, None] for w in (page_min, page_max))
    rows = q.astype(jnp.float32).reshape(B, K, H // K, 1, d)
    bound = jnp.maximum(rows * low, rows * high).sum(axis=-1)
    bound = jnp.where(jnp.arange(n) < num_pages[:, :, None, None], bound, -jnp.inf)
    return bound.max(axis=2) if reduce == "max" else bound.reshape(B, H, n)
