"""Paged attention as grouped matmuls: no key or value is repeated, consecutive pages are read where they lie."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.merge import merge
from pallas_kernels.materialise import hold
from pallas_kernels.paged_attention.operands import bits, floats, mixture, scores, silence
from pallas_kernels.paged_attention.options import Options, Reads
from pallas_kernels.paged_attention.quantized import QuantizedPages
from pallas_kernels.paged_attention.selection import indices, seen_sealed, seen_tail

REASON = "grouped matmuls fused by XLA, page gathers one KV head at a time"


def supports(*_args, **_options) -> str | None:
    return None


def attend(rows, keys, values, seen, soft_cap, dtype):
    """Softmax over one set of keys.

    Args:
        rows: scaled queries f32[b, k, m, d], m = W * G, a query's group together.
        keys: [b, n, k, p, d], array or QuantizedPages.
        values: as keys.
        seen: bool[b, k or 1, W, n p].
        soft_cap: bound of the scores or None.
        dtype: of the operands.

    Returns:
        output f32[b, k, m, d], lse f32[b, k, m] and probabilities f32[b, k, m, n p].
    """
    b, n, k, p, _ = keys.shape
    m, W = rows.shape[2], seen.shape[2]
    score = scores(rows, keys, dtype).transpose(0, 2, 4, 1, 3).reshape(b, k, W, m // W, n * p)
    score = score if soft_cap is None else soft_cap * jnp.tanh(score / soft_cap)
    score = jnp.where(seen[:, :, :, None], score, -jnp.inf).reshape(b, k, m, n * p)
    peak = jnp.max(score, axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = hold(jnp.exp(score - peak))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    paged = weights.reshape(b, k, m, values.shape[1], values.shape[3])
    out = mixture(jnp.moveaxis(paged, 3, 1), values, dtype) / total
    return out, jnp.where(some, peak + jnp.log(total), -jnp.inf)[..., 0], weights / total


def _in_place(pool, B, copy):
    """[B, n, K, page, d] of consecutive pages; with ``copy`` [B, 1, K, n page, d] unless pages have scales."""
    copy = copy and not (isinstance(pool, QuantizedPages) and pool.per_channel)

    def view(leaf):
        leaf = leaf.reshape(B, -1, *leaf.shape[1:])
        return leaf.swapaxes(1, 2).reshape(B, 1, leaf.shape[2], -1, leaf.shape[-1]) if copy else leaf

    return jax.tree.map(view, pool)


def _gather(pool, kept, page_at, token_at):
    """[1, n, 1, p, d] where pages have scales of their own, else [1, 1, 1, n p, d], of one row and KV head.

    Args:
        pool: [P, K, page, d], array or QuantizedPages, of which only shapes and dtypes are looked at.
        kept: its :func:`bits`.
        page_at: i32[n] indices into [P K].
        token_at: i32[n] indices into [P K page], single tokens instead of pages; None: whole pages.
    """
    paged = isinstance(pool, QuantizedPages) and pool.per_channel

    def read(leaf, kept):
        single = token_at is not None and leaf.shape[2] == pool.shape[2]
        flat = kept.reshape(-1, 1 if single else leaf.shape[2], leaf.shape[3])
        found = flat.at[token_at if single else page_at].get(mode="promise_in_bounds")
        found = floats(found, leaf.dtype)
        return found[None, :, None] if paged else found.reshape(1, 1, 1, -1, leaf.shape[3])

    return jax.tree.map(read, pool, kept)


def _gathered(rows, k_pages, v_pages, table, tokens, seen, soft_cap, dtype, granularity):
    """:func:`attend` over one (row, KV head) after the other, so that gathered keys stay in the CPU's caches."""
    B, K = rows.shape[:2]
    P, _, page, _ = k_pages.shape
    page_at = jnp.clip(table, 0, P - 1) * K + jnp.arange(K, dtype=table.dtype)[:, None]
    # Floats that enter a loop would be written out first, whole pools of them.
    kept = [jax.tree.map(bits, pool) for pool in (k_pages, v_pages)]
    token_at = page_at * page + jnp.maximum(tokens[..., 0], 0) % page if granularity == "token" else None

    def one(pair):
        rows, seen, page_at, token_at = pair
        keys, values = map(_gather, (k_pages, v_pages), kept, (page_at,) * 2, (token_at,) * 2)
        # Entries of no page, and what lies behind a row's last token, may hold anything.
        values = silence(values, seen.any(axis=0).reshape(1, values.shape[1], 1, values.shape[3]))
        found = attend(rows[None, None], keys, values, seen[None, None], soft_cap, dtype)
        return jax.tree.map(lambda w: w[0, 0], found)

    pairs = jax.tree.map(lambda w: w.reshape(B * K, *w.shape[2:]), (rows, seen, page_at, token_at))
    return jax.tree.map(lambda w: w.reshape(B, K, *w.shape[1:]), jax.lax.map(one, pairs))


def tail_part(rows, tail, q_positions, window, soft_cap, dtype):
    """:func:`attend` over the open tail."""
    within = seen_tail(tail.length, tail.positions, tail.mask, q_positions, window)
    values = silence(tail.v[:, None], within.any(axis=2)[:, None])
    return attend(rows, tail.k[:, None], values, within, soft_cap, dtype)


def grouped_rows(q, K, scale):
    """Scaled queries f32[B, K, W * G, d], a query's group of heads together."""
    B, W, H, d = q.shape
    rows = (q.astype(jnp.float32) * scale).reshape(B, W, K, H // K, d)
    return rows.swapaxes(1, 2).reshape(B, K, -1, d)


def ungrouped(out, W):
    """[B, K, W * G, ...] as [B, W, H, ...]."""
    B, K = out.shape[:2]
    return out.reshape(B, K, W, -1, *out.shape[3:]).swapaxes(1, 2).reshape(B, W, -1, *out.shape[3:])


def mean_share(q_positions, groups):
    """f32[B, 1, 1]: what one query row counts in the mean over a row's live queries and a group's heads."""
    return 1 / (jnp.maximum(jnp.sum(q_positions >= 0, axis=1), 1) * groups)[:, None, None]


def mean_mass(weights, own, lse, share):
    """f32[B, K, s]: mean probability of each key of one part.

    Args:
        weights: f32[B, K, m, s], probabilities within the part.
        own: f32[B, K, m], log-sum-exp of the part.
        lse: f32[B, K, m], that of all parts.
        share: as :func:`mean_share` gives it.
    """
    total = jnp.where(lse == -jnp.inf, 0, lse)
    return jnp.einsum("bkms,bkm->bks", weights, jnp.exp(own - total)) * share


def run(q, k_pages, v_pages, reads: Reads, options: Options):
    B, W, H, _ = q.shape
    P, K, page, _ = k_pages.shape
    kept = q.dtype if isinstance(k_pages, QuantizedPages) else k_pages.dtype
    dtype = jnp.dtype(kept if options.operand_dtype is None else options.operand_dtype)
    rows = grouped_rows(q, K, options.scale)
    table, tail, q_positions = reads.table, reads.tail, reads.q_positions
    window, soft_cap, granularity = options.window, options.soft_cap, options.granularity
    shape = (B, K, P // B) if table is None else table.shape
    tokens = indices(shape, page, reads.logical, reads.count, granularity)
    seen = seen_sealed(tokens.reshape(B, K, -1), reads.kv_len, q_positions, window)
    if table is None:
        # Products with single pages are small: many rows repay one copy that puts each head's pages together, and codes
        # are copied anyway, to become operands.
        many = rows.shape[2] > page
        keys, values = (
            _in_place(pool, B, many or isinstance(pool, QuantizedPages)) for pool in (k_pages, v_pages)
        )
        sealed = attend(rows, keys, values, seen, soft_cap, dtype)
    else:
        sealed = _gathered(rows, k_pages, v_pages, table, tokens, seen, soft_cap, dtype, granularity)
    out, lse, weights = sealed
    parts = [(lse, weights)]
    if tail is not None:
        part = tail_part(rows, tail, q_positions, window, soft_cap, dtype)
        parts.append(part[1:])
        out, lse = merge((out, lse), part[:2])
    mass = None
    if options.return_mass:
        share = mean_share(q_positions, H // K)
        means = [mean_mass(weights, own, lse, share) for own, weights in parts]
        mass = (means[0].reshape(tokens.shape), means[1] if tail is not None else jnp.zeros((B, K, 0)))
    return ungrouped(out, W).astype(q.dtype), ungrouped(lse, W), mass
