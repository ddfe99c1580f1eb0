"""Two products: the positive part of the query with the greatest values, the negative part with the least."""

import jax.numpy as jnp

from pallas_kernels.precision import contract

REASON = "two grouped matmuls over gathered bounds, fused by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def run(q, page_min, page_max, *, table, num_pages, reduce):
    B, H, d = q.shape
    P, K, _ = page_min.shape
    n = table.shape[2]
    at = jnp.clip(table, 0, P - 1) * K + jnp.arange(K, dtype=table.dtype)[:, None]
    there = jnp.arange(n) < num_pages[..., None]
    rows = q.astype(jnp.float32).reshape(B, K, H // K, d)
    bound = 0.0
    for bounds, part in ((page_max, jnp.maximum(rows, 0)), (page_min, jnp.minimum(rows, 0))):
        found = bounds.reshape(P * K, d).at[at].get(mode="promise_in_bounds").astype(jnp.float32)
        # The bounds as left operand, as with a cache: faster on CPU for a few rows of queries.
        bound = bound + contract("bknd,bkgd->bkng", found, part)
    bound = jnp.where(there[..., None], bound, -jnp.inf)
    return bound.max(axis=3) if reduce == "max" else bound.swapaxes(2, 3).reshape(B, H, n)
