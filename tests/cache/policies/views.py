"""Views of random stored tokens, for tests of single policies."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.cache.view import Layout, View
from pallas_kernels.paged_attention import quantize_pages


def layout(**changes: Any) -> Layout:
    """A small one."""
    sizes = {"slots": 3, "pages": 24, "pages_per_slot": 6, "page": 4, "tail": 4, "kv_heads": 2, "group": 2}
    return Layout(**(sizes | {"head_dim": 8, "scale": 8**-0.5} | changes))


def view(
    sizes: Layout,
    k: np.ndarray,
    v: np.ndarray,
    lengths: list[int],
    rng: np.random.Generator,
    bits: int | None = None,
    sealed: list[int] | None = None,
) -> View:
    """Rows 0 .. B - 1 in slots 0 .. B - 1 with tokens k, v f32[B, K, L, d], of which ``lengths`` are stored.

    Pages lie in random order; what is not stored is NaN (where pages are plain). Every full page is sealed unless
    ``sealed`` says otherwise.
    """
    B, page, n = len(lengths), sizes.page, sizes.pages_per_slot
    length = np.asarray(lengths)
    in_pages = np.minimum(length // page, n) * page if sealed is None else np.asarray(sealed)
    table = rng.permutation(sizes.pages)[: B * n].reshape(B, n)
    pools, tails = [], []
    for values in (k, v):
        pool = np.full((sizes.pages, sizes.kv_heads, page, sizes.head_dim), 0 if bits else np.nan, np.float32)
        tail = np.full((B, sizes.kv_heads, sizes.tail, sizes.head_dim), np.nan, np.float32)
        for row in range(B):
            for i in range(in_pages[row] // page):
                pool[table[row, i]] = values[row, :, i * page : (i + 1) * page]
            tail[row, :, : length[row] - in_pages[row]] = values[row, :, in_pages[row] : length[row]]
        pools.append(quantize_pages(jnp.asarray(pool), bits=bits) if bits else jnp.asarray(pool))
        tails.append(jnp.asarray(tail))
    return View(
        slots=jnp.arange(B, dtype=jnp.int32),
        table=jnp.asarray(table, jnp.int32),
        sealed=jnp.asarray(in_pages, jnp.int32),
        k_pages=pools[0],
        v_pages=pools[1],
        tail_k=tails[0],
        tail_v=tails[1],
        tail_len=jnp.asarray(length - in_pages, jnp.int32),
        scale=sizes.scale,
    )
