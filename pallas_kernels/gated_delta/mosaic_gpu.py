"""The gated delta rule on Hopper GPUs through Mosaic: bfloat16 operands, float32 decays, inverses and states.

Source: the WY form of Gated Delta Networks (arXiv 2412.06464, section 3.3), with the reads of a state taken from the values
before the triangular inverse instead of after it: one product with the inverse instead of two.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.common import LOG2E, ROWS
from pallas_kernels.gated_delta import xla
from pallas_kernels.gated_delta.mosaic_states import pass_states
from pallas_kernels.gated_delta.tiles import Tiles
from pallas_kernels.gated_delta.triangular import unit_lower_inverse
from pallas_kernels.ssd.mosaic_outputs import outputs
from pallas_kernels.ssd.pieces import filled, log_decays, pieces_of
from pallas_kernels.tiles import tiles

REASON = (
    "TMA and WGMMA kernels of our own, forward: states passed from chunk to chunk, then every chunk at once"
)
BESIDE = (
    "casts, paddings, the list of the pieces (gathers of integers), the sums of log decays inside chunks, the products of "
    "keys with keys and the float32 inverses of the chunks' triangles, transposed initial and final states; all of backward"
)


def supports(q, _k, v, _g, _beta, *, chunk_size, operand_dtype, **_options) -> str | None:
    dk, dv = q.shape[3], v.shape[3]
    if q.shape[1] == 1:
        return "a call of one token is float32 throughout"
    if operand_dtype is None or jnp.dtype(operand_dtype) != jnp.bfloat16:
        return f"operands are bfloat16, not {jnp.dtype(operand_dtype or jnp.float32).name}"
    if dk % 32 or not 64 <= dk <= 256:
        return f"dk = {dk} is no multiple of 32 from 64 to 256"
    if dv % ROWS or dv > 256:
        return f"dv = {dv} is no multiple of 64 from 64 to 256"
    if chunk_size < ROWS:
        return f"chunk_size={chunk_size} is less than its chunk of {ROWS} tokens"
    return None


def _solve(k, beta, since, ids):
    """``(I + N)^-1 beta`` of each chunk, bfloat16 [B, Hv, L, 64]; N: overlaps of keys, decayed, times strengths of writes."""
    B, L, H, _ = k.shape
    Hv = beta.shape[1]
    k = k.reshape(B, -1, ROWS, H, k.shape[3])
    overlap = jnp.einsum("bcihd,bcjhd->bhcij", k, k, preferred_element_type=jnp.float32)
    beta, since = (x.reshape(B, Hv, -1, ROWS) for x in (beta, since))
    ids = ids.reshape(B, 1, -1, ROWS)
    pair = jnp.tril(ids[..., :, None] == ids[..., None, :], -1)
    # Masked before the exponential: back in time the difference is positive and may overflow.
    fading = jnp.exp(jnp.where(pair, since[..., :, None] - since[..., None, :], -jnp.inf))
    inverse = unit_lower_inverse(beta[..., None] * jnp.repeat(overlap, Hv // H, axis=1) * fading)
    return (inverse * beta[..., None, :]).astype(jnp.bfloat16).reshape(B, Hv, L, ROWS)


def _forward(q, k, v, g, beta, start, segment_ids, n, open_ends, config):
    """o in the dtype of v, and the final states [B, n, Hv, dk, dv]."""
    batch, T, _, dk = q.shape
    Hv, dv = v.shape[2:]
    L, out_dtype = -(-T // ROWS) * ROWS, v.dtype
    if segment_ids is not None:
        live = segment_ids > 0
        q, k, v, g, beta = (
            jnp.where(live.reshape(batch, T, *[1] * (x.ndim - 2)), x, 0) for x in (q, k, v, g, beta)
        )
    pieces = pieces_of(segment_ids, batch, T, L, ROWS, n, open_ends)
    q, k, v = (filled(x, L, jnp.bfloat16) for x in (q, k, v))
    g, beta = (filled(x, L, jnp.float32).swapaxes(1, 2) for x in (g, beta))
    since, until = log_decays(g, pieces.ids, ROWS)
    solve = _solve(k, beta, since, pieces.ids)
    decays = jnp.exp(jnp.stack([since, until], axis=2))
    turned = start.swapaxes(3, 4)
    new, states, final = pass_states(k, v, solve, decays, turned, pieces, stages=config.stages)
    final = jnp.where(pieces.occurs[..., None, None, None], final, turned).swapaxes(3, 4)
    # Value channels do not meet: a wide head is several heads of as many keys.
    P = 128 if dv % 128 == 0 else 64
    new, states = new.reshape(batch, L, -1, P), states.reshape(*states.shape[:2], -1, P, dk)
    rows = jnp.repeat(jnp.stack([since * LOG2E, jnp.ones_like(since)], axis=2), dv // P, axis=1)
    launch: dict[str, Any] = {"chunk": ROWS, "stages": 1, "name": "gated_delta_outputs"}
    o = outputs(new, k, q, None, rows, pieces, states, **launch)
    return o.reshape(batch, L, Hv, dv)[:, :T].astype(out_dtype), final


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def _rule(q, k, v, g, beta, start, segment_ids, n, open_ends, chunk_size, config):
    """:func:`_forward`; the gradient is that of XLA's chunks, which are computed anew for it."""
    del chunk_size
    return _forward(q, k, v, g, beta, start, segment_ids, n, open_ends, config)


def _rule_fwd(q, k, v, g, beta, start, segment_ids, n, open_ends, chunk_size, config):
    out = _rule(q, k, v, g, beta, start, segment_ids, n, open_ends, chunk_size, config)
    return out, (q, k, v, g, beta, start, segment_ids)


def _rule_bwd(n, open_ends, chunk_size, config, kept, cotangents):
    del config
    *arrays, segment_ids = kept

    def again(q, k, v, g, beta, start):
        o, final = xla.run(
            *(q, k, v, g, beta),
            segment_ids=segment_ids,
            initial_state=start,
            num_segments=n,
            open_ends=open_ends,
            chunk_size=chunk_size,
            operand_dtype=jnp.bfloat16,
        )
        return o, start if final is None else final

    _, pull = jax.vjp(again, *arrays)
    return *pull(cotangents), None


_rule.defvjp(_rule_fwd, _rule_bwd)


def run(q, k, v, g, beta, *, segment_ids, initial_state, num_segments, open_ends, chunk_size, operand_dtype):
    del operand_dtype
    rows, _, _, dk = q.shape
    Hv, dv = v.shape[2:]
    n = num_segments
    config = tiles("gated_delta", f"dk{dk} dv{dv}", Tiles())
    if initial_state is None:
        initial_state = jnp.zeros((rows, n or 1, Hv, dk, dv), jnp.float32)
    start = initial_state.astype(jnp.float32)
    out: Any = _rule(q, k, v, g, beta, start, segment_ids, n, open_ends, chunk_size, config)
    o, final = out
    return o, None if n is None else final
