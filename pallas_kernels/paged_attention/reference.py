"""Every key gathered, every score written out, one softmax over sealed pages and open tail, in float32."""

import jax.numpy as jnp

from pallas_kernels.paged_attention.quantized import QuantizedPages, dequantize_pages
from pallas_kernels.paged_attention.selection import indices, seen_sealed, seen_tail

REASON = "the oracle of the tests: all scores at once"


def supports(*_args, operand_dtype=None, **_options) -> str | None:
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.float32:
        return f"it computes in float32, not with operand_dtype={jnp.dtype(operand_dtype).name}"
    return None


def run(
    q,
    k_pages,
    v_pages,
    *,
    table,
    logical,
    count,
    granularity,
    kv_len,
    q_positions,
    tail,
    window,
    soft_cap,
    scale,
    operand_dtype,
    return_mass,
):
    del operand_dtype
    B, W, H, d = q.shape
    P, K, page, _ = k_pages.shape
    if table is None:
        table = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32).reshape(B, 1, P // B), (B, K, P // B))
    tokens = indices(table.shape, page, logical, count, granularity)
    slots = jnp.maximum(tokens, 0) % page

    def read(pages):
        pages = dequantize_pages(pages) if isinstance(pages, QuantizedPages) else pages.astype(jnp.float32)
        heads = jnp.arange(K)[:, None, None]
        return pages[jnp.clip(table, 0, P - 1)[..., None], heads, slots].reshape(B, K, -1, d)

    k, v = read(k_pages), read(v_pages)
    seen = seen_sealed(tokens.reshape(B, K, -1), kv_len, q_positions, window)
    if tail is not None:
        k, v = (jnp.concatenate([w, t.astype(jnp.float32)], 2) for w, t in ((k, tail.k), (v, tail.v)))
        within = seen_tail(tail.length, tail.positions, tail.mask, q_positions, window)
        seen = jnp.concatenate([seen, jnp.broadcast_to(within, (B, K, *within.shape[2:]))], axis=3)
    v = jnp.where(seen.any(axis=2)[..., None], v, 0)
    rows = q.astype(jnp.float32).reshape(B, W, K, H // K, d)
    scores = scale * jnp.einsum("bwkgd,bksd->bkgws", rows, k, precision="highest")
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    some = seen.any(axis=-1)[:, :, None, :, None]
    peak = jnp.where(some, jnp.max(scores, axis=-1, keepdims=True), 0)
    weights = jnp.exp(scores - peak)
    total = jnp.where(some, weights.sum(axis=-1, keepdims=True), 1)
    weights = weights / total
    out = jnp.einsum("bkgws,bksd->bwkgd", weights, v, precision="highest").reshape(q.shape)
    lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)[..., 0]
    lse = jnp.moveaxis(lse, 3, 1).reshape(B, W, H)
    if not return_mass:
        return out.astype(q.dtype), lse, None
    live = jnp.maximum(jnp.sum(q_positions >= 0, axis=1), 1)
    mass = weights.sum(axis=(2, 3)) / (live * (H // K))[:, None, None]
    sealed = tokens.shape[2] * tokens.shape[3]
    return out.astype(q.dtype), lse, (mass[..., :sealed].reshape(tokens.shape), mass[..., sealed:])
