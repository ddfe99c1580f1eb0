"""Values of paged attention's arguments, checked where the caller asks for it."""

import jax.numpy as jnp

from pallas_kernels import compat


def check_values(shape, table, logical, count, granularity, kv_len, tail) -> None:
    """Checks in the sense of ``jax.experimental.checkify``; ``shape``: (P, K, page, d) of the pools."""
    checkify = compat.checkify
    P, _, page, _ = shape
    if table is not None:
        entry = jnp.arange(table.shape[2])
        used = entry < (table.shape[2] if count is None else count[..., None])
        used = used if logical is None else used & (logical >= 0)
        first = logical if granularity == "token" else (entry if logical is None else logical) * page
        used = used & (first < kv_len[..., None])
        wrong = used & ((table < 0) | (table >= P))
        checkify.check(
            ~wrong.any(),
            "table: {wrong} entries in use lie outside the pool, expected 0 to {last}",
            wrong=wrong.sum(),
            last=jnp.int32(P - 1),
        )
        if count is not None:
            bad = (count < 0) | (count > table.shape[2])
            checkify.check(
                ~bad.any(), "count: expected 0 to {n} [table's entries]", n=jnp.int32(table.shape[2])
            )
        if logical is not None:
            checkify.check((logical >= -1).all(), "logical: expected -1 or an index")
    checkify.check((kv_len >= 0).all(), "kv_len: expected lengths of at least 0")
    if tail is not None:
        t = tail.k.shape[2]
        bad = (tail.length < 0) | (tail.length > t)
        checkify.check(~bad.any(), "tail.length: expected 0 to {t}", t=jnp.int32(t))
