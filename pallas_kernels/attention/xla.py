"""Attention by blocks of queries, grouped so that no key or value is repeated."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import Marks, visible
from pallas_kernels.attention.options import Options
from pallas_kernels.materialise import hold
from pallas_kernels.precision import contract

REASON = "query blocks of grouped matmuls fused by XLA"

_BLOCK = 128


def supports(*_args, **_options) -> str | None:
    return None


def _masked(scores, seen, soft_cap):
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(seen, scores, -jnp.inf)


def _seen(q_places, kv_places, window):
    """bool[B, t, S]; q_places: (positions, ids, mask or None) of the queries, kv_places: (positions, ids)."""
    positions, ids, mask = q_places
    return visible(Marks(positions, kv_places[0], ids, kv_places[1], mask), window)


def _softmax(scores):
    """exp(scores - max) over the last axis, its sum (1 where nothing is seen) and the log of the true sum."""
    peak = jnp.max(scores, axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = hold(jnp.exp(scores - peak))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    return weights, total, jnp.where(some, peak + jnp.log(total), -jnp.inf)


def _one_token(q, k, v, q_places, kv_places, window, soft_cap, kv_layout, dtype):
    """Decode: output [B, 1, H, d] and lse [B, 1, H] of scaled queries."""
    B, _, H, d = q.shape
    s, K = ("bksd", k.shape[1]) if kv_layout == "BKTD" else ("bskd", k.shape[2])
    rows = q.reshape(B, K, H // K, d)
    # The cache as left operand: three times faster on CPU for a few rows of queries.
    scores = contract(f"{s},bkmd->bksm", k, rows, operand_dtype=dtype).swapaxes(2, 3)
    seen = _seen(q_places, kv_places, window)[:, None]
    weights, total, lse = _softmax(_masked(scores, seen, soft_cap))
    out = contract(f"bkms,{s}->bkmd", weights, v, operand_dtype=dtype) / total
    return out.reshape(B, 1, H, d), lse.reshape(B, 1, H)


def _split(w, blocks, size):
    """[B, T, ...] to [blocks, B, size, ...], zero padded."""
    w = jnp.pad(w, ((0, 0), (0, blocks * size - w.shape[1]), *[(0, 0)] * (w.ndim - 2)))
    return w.reshape(w.shape[0], blocks, size, *w.shape[2:]).swapaxes(0, 1)


def _rows(w, K):
    """[blocks, B, t, H, ...] to [blocks, B, K, G, t, ...]: the queries of a group are rows of one matmul."""
    blocks, B, t, H = w.shape[:4]
    return jnp.moveaxis(w.reshape(blocks, B, t, K, H // K, *w.shape[4:]), 2, 4)


def _join(w, T):
    """[blocks, B, K, G, t, ...] back to [B, T, H, ...]."""
    blocks, B, K, G, t = w.shape[:5]
    return jnp.moveaxis(w, (0, 4), (1, 2)).reshape(B, blocks * t, K * G, *w.shape[5:])[:, :T]


def _over(blocks, step, carry, xs):
    """``lax.scan``, but a single block is not worth a loop."""
    if blocks > 1:
        return jax.lax.scan(step, carry, xs)
    carry, ys = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


def _einsum(spec, a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, q_places, kv_places, window, soft_cap, dtype):
    """Output [B, T, H, d] and lse [B, T, H] of scaled queries over k, v [B, K, S, d]; places as in :func:`_seen`."""
    return _attend_fwd(q, k, v, q_places, kv_places, window, soft_cap, dtype)[0]


def _blocked(w, K):
    """[B, T, H, ...] by blocks of queries, as :func:`_rows` has them."""
    T = w.shape[1]
    return _rows(_split(w, -(-T // _BLOCK), min(T, _BLOCK)), K)


def _operands(q, k, v, q_places, dtype):
    """Queries and their places by blocks, keys and values, all in memory."""
    T = q.shape[1]
    places = jax.tree.map(lambda w: _split(w, -(-T // _BLOCK), min(T, _BLOCK)), q_places)
    return hold(_blocked(q, k.shape[1]).astype(dtype)), hold(k.astype(dtype)), hold(v.astype(dtype)), places


def _attend_fwd(q, k, v, q_places, kv_places, window, soft_cap, dtype):
    T, K = q.shape[1], k.shape[1]
    queries, keys, values, places = _operands(q, k, v, q_places, dtype)
    blocks = queries.shape[0]

    def step(_, block):
        rows, places = block
        B, _, G, t, d = rows.shape
        scores = _einsum("bkmd,bksd->bkms", rows.reshape(B, K, G * t, d), keys).reshape(B, K, G, t, -1)
        seen = _seen(places, kv_places, window)[:, None, None]
        weights, total, lse = _softmax(_masked(scores, seen, soft_cap))
        out = _einsum("bkms,bksd->bkmd", weights.astype(dtype).reshape(B, K, G * t, -1), values)
        return None, (out.reshape(rows.shape) / total, lse[..., 0])

    outputs: Any = _over(blocks, step, None, (queries, places))[1]
    out, lse = outputs
    like = tuple(jnp.zeros((0,), w.dtype) for w in (q, k, v))
    residuals = (queries, keys, values, places, kv_places, out, lse, like)
    return (_join(out, T), _join(lse, T)), residuals


def _attend_bwd(window, soft_cap, dtype, residuals, cotangents):
    """The scores are taken again, keys before queries: then only narrow operands are read transposed."""
    queries, keys, values, places, kv_places, out, lse, like = residuals
    T = cotangents[0].shape[1]
    blocks, B, K, G, t, d = queries.shape
    dout, dlse = (_rows(_split(w.astype(jnp.float32), blocks, t), K) for w in cotangents)
    shift = jnp.sum(dout * out, axis=-1) - dlse
    # A row that sees nothing has no weights: any finite log of their sum will do.
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    across = hold(keys.swapaxes(2, 3))

    def step(carry, block):
        dk, dv = carry
        rows, places, dout, lse, shift = block
        rows, dout = (w.reshape(B, K, G * t, d) for w in (rows, dout))
        scores = _einsum("bksd,bkmd->bksm", keys, rows).reshape(B, K, -1, G, t)
        seen = _seen(places, kv_places, window).swapaxes(1, 2)[:, None, :, None]
        scores = _masked(scores, seen, soft_cap)
        weights = hold(jnp.exp(scores - lse[:, :, None]))
        dweights = _einsum("bksd,bkmd->bksm", values, dout).reshape(weights.shape)
        dscores = weights * (dweights - shift[:, :, None])
        if soft_cap is not None:
            dscores = dscores * (1 - jnp.square(jnp.where(seen, scores, 0) / soft_cap))
        weights, dscores = (hold(w.astype(dtype)).reshape(B, K, -1, G * t) for w in (weights, dscores))
        dq = _einsum("bkds,bksm->bkdm", across, dscores)
        dk = dk + _einsum("bksm,bkmd->bksd", dscores, rows)
        dv = dv + _einsum("bksm,bkmd->bksd", weights, dout)
        return (dk, dv), dq.reshape(B, K, d, G, t)

    start = tuple(jnp.zeros(w.shape, jnp.float32) for w in (keys, values))
    blocked = (queries, places, hold(dout.astype(dtype)), lse, shift)
    (dk, dv), dq = _over(blocks, step, start, blocked)
    grads = (_join(jnp.moveaxis(dq, 3, 5), T), dk, dv)
    return *(g.astype(w.dtype) for g, w in zip(grads, like, strict=True)), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _sides(marks: Marks):
    """What :func:`_seen` takes."""
    return (marks.q_positions, marks.q_segment_ids, marks.mask), (marks.kv_positions, marks.kv_segment_ids)


def run(q, k, v, marks: Marks, options: Options):
    # Rounding a whole cache would cost more than the products of one token.
    asked = None if q.shape[1] == 1 else options.operand_dtype
    dtype = jnp.dtype(k.dtype if asked is None else asked)
    scaled = q.astype(jnp.float32) * options.scale
    given = (*_sides(marks), options.window, options.soft_cap)
    if q.shape[1] == 1:
        out, lse = _one_token(scaled, k, v, *given, options.kv_layout, dtype)
    else:
        if options.kv_layout == "BTKD":
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        outputs: Any = _attend(scaled, k, v, *given, dtype)
        out, lse = outputs
    return out.astype(q.dtype), lse


def backward(q, k, v, out, lse, dout, dlse, marks: Marks, options: Options):
    dtype = jnp.dtype(k.dtype if options.operand_dtype is None else options.operand_dtype)
    if options.kv_layout == "BTKD":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    q_places, kv_places = _sides(marks)
    scaled = q.astype(jnp.float32) * options.scale
    queries, keys, values, places = _operands(scaled, k, v, q_places, dtype)
    kept = tuple(_blocked(w.astype(jnp.float32), k.shape[1]) for w in (out, lse))
    like = tuple(jnp.zeros((0,), w.dtype) for w in (scaled, k, v))
    dlse = jnp.zeros_like(lse) if dlse is None else dlse
    residuals = (queries, keys, values, places, kv_places, *kept, like)
    dq, dk, dv, _, _ = _attend_bwd(options.window, options.soft_cap, dtype, residuals, (dout, dlse))
    if options.kv_layout == "BTKD":
        dk, dv = dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    return (dq * options.scale).astype(q.dtype), dk, dv
