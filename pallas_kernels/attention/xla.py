"""Attention by blocks of queries, grouped so that no key or value is repeated."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import visible
from pallas_kernels.precision import contract

REASON = "query blocks of grouped matmuls fused by XLA; no GPU kernel of this op is present"

_BLOCK = 128


def supports(*_args, **_options) -> str | None:
    return None


def _attend(q, q_positions, q_ids, k, v, kv_positions, kv_ids, window, soft_cap, kv_layout, dtype):
    """Output [B, T, H, d] and lse [B, T, H] of scaled queries, all scores at once."""
    B, T, H, d = q.shape
    s, K = ("bksd", k.shape[1]) if kv_layout == "BKTD" else ("bskd", k.shape[2])
    G = H // K
    # The queries of a group are rows of one matmul per key head.
    rows = q.reshape(B, T, K, G, d).swapaxes(1, 2).reshape(B, K, T * G, d)
    if T == 1:
        # The cache as left operand: three times faster on CPU for a few rows of queries.
        scores = contract(f"{s},bkmd->bksm", k, rows, operand_dtype=dtype).swapaxes(2, 3)
    else:
        scores = contract(f"bkmd,{s}->bkms", rows, k, operand_dtype=dtype)
    scores = scores.reshape(B, K, T, G, -1)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = visible(q_positions, kv_positions, q_ids, kv_ids, window)[:, None, :, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    out = contract(f"bkms,{s}->bkmd", weights.reshape(B, K, T * G, -1), v, operand_dtype=dtype)
    out = out.reshape(B, K, T, G, d) / total
    lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)
    return out.swapaxes(1, 2).reshape(B, T, H, d), lse.swapaxes(1, 2).reshape(B, T, H)


def run(
    q,
    k,
    v,
    *,
    q_positions,
    kv_positions,
    q_segment_ids,
    kv_segment_ids,
    window,
    soft_cap,
    scale,
    kv_layout,
    operand_dtype,
):
    B, T = q.shape[:2]
    # Rounding a whole cache would cost more than the products of one token.
    dtype = k.dtype if T == 1 or operand_dtype is None else operand_dtype
    q_scaled = q.astype(jnp.float32) * scale

    def attend(block):
        q, places, ids = block
        return _attend(q, places, ids, k, v, kv_positions, kv_segment_ids, window, soft_cap, kv_layout, dtype)

    queries = (q_scaled, q_positions, q_segment_ids)
    if T <= _BLOCK:
        out, lse = attend(queries)
        return out.astype(q.dtype), lse
    blocks = -(-T // _BLOCK)

    def split(w):
        w = jnp.pad(w, ((0, 0), (0, blocks * _BLOCK - T), *[(0, 0)] * (w.ndim - 2)))
        return w.reshape(B, blocks, _BLOCK, *w.shape[2:]).swapaxes(0, 1)

    # Scores are recomputed in the backward pass, so that memory holds one block of them at a time.
    out, lse = jax.lax.map(jax.checkpoint(attend), tuple(split(w) for w in queries))

    def join(w):
        return w.swapaxes(0, 1).reshape(B, blocks * _BLOCK, *w.shape[3:])[:, :T]

    return join(out).astype(q.dtype), join(lse)
