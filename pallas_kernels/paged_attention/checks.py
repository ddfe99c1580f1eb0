"""Values of paged attention's arguments, checked where the caller asks for it."""

import jax.numpy as jnp

from pallas_kernels import compat


def _check_entries(table, used, pages: int) -> None:
    """Entries in use name one of the ``pages`` of a pool; the others may hold anything."""
    wrong = used & ((table < 0) | (table >= pages))
    compat.checkify.check(
        ~wrong.any(),
        "table: {wrong} entries in use lie outside the pool, expected 0 to {last}",
        wrong=wrong.sum(),
        last=jnp.int32(pages - 1),
    )


def _check_range(name: str, values, most: int, what: str) -> None:
    good = ((values >= 0) & (values <= most)).all()
    compat.checkify.check(good, name + ": expected 0 to {most}" + what, most=jnp.int32(most))


def check_scored(pages: int, table, num_pages) -> None:
    """Likewise of the pages that ``page_scores`` scores; ``pages``: P."""
    n = table.shape[2]
    _check_entries(table, jnp.arange(n) < num_pages[..., None], pages)
    _check_range("num_pages", num_pages, n, " [table's entries]")


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
        _check_entries(table, used, P)
        if count is not None:
            _check_range("count", count, table.shape[2], " [table's entries]")
        if logical is not None:
            checkify.check((logical >= -1).all(), "logical: expected -1 or an index")
    checkify.check((kv_len >= 0).all(), "kv_len: expected lengths of at least 0")
    if tail is not None:
        _check_range("tail.length", tail.length, tail.k.shape[2], "")
