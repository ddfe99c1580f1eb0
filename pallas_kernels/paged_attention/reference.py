"""Every key gathered, every score written out, one softmax over sealed pages and open tail, in float32."""

import jax.numpy as jnp

from pallas_kernels.paged_attention.options import Options, Reads
from pallas_kernels.paged_attention.quantized import QuantizedPages, dequantize_pages
from pallas_kernels.paged_attention.selection import indices, seen_sealed, seen_tail

REASON = "the oracle of the tests: all scores at once"


def supports(_q, _k_pages, _v_pages, _reads: Reads, options: Options) -> str | None:
    dtype = options.operand_dtype
    if dtype is not None and jnp.dtype(dtype) != jnp.float32:
        return f"it computes in float32, not with operand_dtype={jnp.dtype(dtype).name}"
    return None


def run(q, k_pages, v_pages, reads: Reads, options: Options):
    B, W, H, d = q.shape
    P, K, page, _ = k_pages.shape
    reads = reads.tabled(P)
    tokens = indices(reads.table.shape, page, reads.logical, reads.count, options.granularity)
    slots = jnp.maximum(tokens, 0) % page

    def read(pages):
        pages = dequantize_pages(pages) if isinstance(pages, QuantizedPages) else pages.astype(jnp.float32)
        heads = jnp.arange(K)[:, None, None]
        return pages[jnp.clip(reads.table, 0, P - 1)[..., None], heads, slots].reshape(B, K, -1, d)

    k, v = read(k_pages), read(v_pages)
    seen = seen_sealed(tokens.reshape(B, K, -1), reads.kv_len, reads.q_positions, options.window)
    tail, soft_cap = reads.tail, options.soft_cap
    if tail is not None:
        k, v = (jnp.concatenate([w, t.astype(jnp.float32)], 2) for w, t in ((k, tail.k), (v, tail.v)))
        within = seen_tail(tail.length, tail.positions, tail.mask, reads.q_positions, options.window)
        seen = jnp.concatenate([seen, jnp.broadcast_to(within, (B, K, *within.shape[2:]))], axis=3)
    v = jnp.where(seen.any(axis=2)[..., None], v, 0)
    rows = q.astype(jnp.float32).reshape(B, W, K, H // K, d)
    scores = options.scale * jnp.einsum("bwkgd,bksd->bkgws", rows, k, precision="highest")
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
    if not options.return_mass:
        return out.astype(q.dtype), lse, None
    live = jnp.maximum(jnp.sum(reads.q_positions >= 0, axis=1), 1)
    mass = weights.sum(axis=(2, 3)) / (live * (H // K))[:, None, None]
    sealed = tokens.shape[2] * tokens.shape[3]
    return out.astype(q.dtype), lse, (mass[..., :sealed].reshape(tokens.shape), mass[..., sealed:])
