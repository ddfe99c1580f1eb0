"""Attention with every score written out, in float32."""

import jax.numpy as jnp

from pallas_kernels.attention.mask import visible

REASON = "the oracle of the tests: all scores at once"


def supports(*_args, operand_dtype=None, **_options) -> str | None:
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.float32:
        return f"it computes in float32, not with operand_dtype={jnp.dtype(operand_dtype).name}"
    return None


def run(
    q,
    k,
    v,
    *,
    q_positions,
    kv_positions,
    q_segment_ids,
    kv_segment_ids,
    mask,
    window,
    soft_cap,
    scale,
    kv_layout,
    operand_dtype,
    return_lse,
):
    del operand_dtype, return_lse
    if kv_layout == "BKTD":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(w.astype(jnp.float32), groups, axis=2) for w in (k, v))
    scores = scale * jnp.einsum("bthd,bshd->bths", q.astype(jnp.float32), k, precision="highest")
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = visible(q_positions, kv_positions, q_segment_ids, kv_segment_ids, window, mask)[:, :, None, :]
    some = jnp.any(seen, axis=-1, keepdims=True)
    # Rows that see nothing take part with all keys and are overwritten: no -inf - (-inf) in either direction.
    scores = jnp.where(seen | ~some, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bths,bshd->bthd", weights / total, v, precision="highest")
    lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)[..., 0]
    return jnp.where(some, out, 0).astype(q.dtype), lse
