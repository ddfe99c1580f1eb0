"""Attention with every score written out, in float32."""

import jax.numpy as jnp

from pallas_kernels.attention.mask import Marks, visible
from pallas_kernels.attention.options import Options

REASON = "the oracle of the tests: all scores at once"


def supports(_q, _k, _v, _marks: Marks, options: Options) -> str | None:
    dtype = options.operand_dtype
    if dtype is not None and jnp.dtype(dtype) != jnp.float32:
        return f"it computes in float32, not with operand_dtype={jnp.dtype(dtype).name}"
    return None


def _scores(q, k, marks, options):
    """Scores [B, T, H, S] of keys repeated to H heads, and which of them are visible (heads broadcast)."""
    scores = options.scale * jnp.einsum("bthd,bshd->bths", q.astype(jnp.float32), k, precision="highest")
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    return scores, visible(marks, options.window)[:, :, None, :]


def _repeated(q, k, v, kv_layout):
    if kv_layout == "BKTD":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    groups = q.shape[2] // k.shape[2]
    return (jnp.repeat(w.astype(jnp.float32), groups, axis=2) for w in (k, v))


def run(q, k, v, marks: Marks, options: Options):
    k, v = _repeated(q, k, v, options.kv_layout)
    scores, seen = _scores(q, k, marks, options)
    some = jnp.any(seen, axis=-1, keepdims=True)
    # Rows that see nothing take part with all keys and are overwritten: no -inf - (-inf) in either direction.
    scores = jnp.where(seen | ~some, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bths,bshd->bthd", weights / total, v, precision="highest")
    lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)[..., 0]
    return jnp.where(some, out, 0).astype(q.dtype), lse


def backward(q, k, v, out, lse, dout, dlse, marks: Marks, options: Options):
    keys, values = _repeated(q, k, v, options.kv_layout)
    scores, seen = _scores(q, keys, marks, options)
    out, dout = out.astype(jnp.float32), dout.astype(jnp.float32)
    weights = jnp.where(seen, jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse)[..., None]), 0)
    shift = jnp.sum(out * dout, axis=-1)
    shift = shift if dlse is None else shift - dlse
    dweights = jnp.einsum("bthd,bshd->bths", dout, values, precision="highest")
    dscores = options.scale * weights * (dweights - shift[..., None])
    if options.soft_cap is not None:
        dscores = dscores * (1 - jnp.square(scores / options.soft_cap))
    dq = jnp.einsum("bths,bshd->bthd", dscores, keys, precision="highest")
    B, T, H, _ = q.shape
    K = k.shape[2 if options.kv_layout == "BTKD" else 1]
    dk, dv = (
        jnp.einsum("btkgs,btkgd->bskd", *(x.reshape(B, T, K, H // K, -1) for x in pair), precision="highest")
        for pair in ((dscores, q.astype(jnp.float32)), (weights, dout))
    )
    if options.kv_layout == "BKTD":
        dk, dv = dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
