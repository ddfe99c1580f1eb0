"""The gated delta rule on Hopper GPUs through Mosaic: bfloat16 operands, float32 decays, inverses and states.

Source: the WY form of Gated Delta Networks (arXiv 2412.06464, section 3.3), with the reads of a state taken from the values
before the triangular inverse instead of after it: one product with the inverse instead of two.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.common import LOG2E, ROWS
from pallas_kernels.gated_delta.mosaic_cotangents import pass_cotangents
from pallas_kernels.gated_delta.mosaic_states import pass_states
from pallas_kernels.gated_delta.tiles import Tiles
from pallas_kernels.gated_delta.triangular import unit_lower_inverse
from pallas_kernels.precision import contract
from pallas_kernels.ssd import tiles as ssd_tiles
from pallas_kernels.ssd.mosaic_gradients import input_gradients, output_gradients
from pallas_kernels.ssd.mosaic_outputs import outputs
from pallas_kernels.ssd.pieces import filled, log_decay_gradients, log_decays, pieces_of
from pallas_kernels.tiles import tiles

REASON = "TMA and WGMMA kernels of our own: states passed from chunk to chunk, then every chunk at once"
BESIDE = (
    "casts, paddings, the list of the pieces (gathers of integers), the sums of log decays inside chunks, the products of "
    "keys with keys and the float32 inverses of the chunks' triangles, both anew for backward, the gradients of these "
    "products, the inner products of states and their cotangents, transposed initial and final states"
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


def _triangle(k, beta, since, ids):
    """Overlaps of keys, decayed, times strengths of writes: strictly lower triangles of chunks [B, Hv, L / 64, 64, 64]."""
    B, _, H, dk = k.shape
    Hv = beta.shape[1]
    k = k.reshape(B, -1, ROWS, H, dk)
    overlap = contract("bcihd,bcjhd->bhcij", k, k)
    beta, since = (x.reshape(B, Hv, -1, ROWS) for x in (beta, since))
    ids = ids.reshape(B, 1, -1, ROWS)
    pair = jnp.tril(ids[..., :, None] == ids[..., None, :], -1)
    # Masked before the exponential: back in time the difference is positive and may overflow.
    fading = jnp.exp(jnp.where(pair, since[..., :, None] - since[..., None, :], -jnp.inf))
    return beta[..., None] * jnp.repeat(overlap, Hv // H, axis=1) * fading


def _of_heads(x, parts):
    """Sums [B, H, ...] over the parts into which value heads were cut."""
    return jnp.sum(x.reshape(x.shape[0], -1, parts, *x.shape[2:]), axis=2)


def _forward(q, k, v, g, beta, start, pieces, config, backward):
    """o and the final states; and what tokens write, the state before each piece, what is left of the values."""
    batch, L, _, dk = q.shape
    Hv, dv = v.shape[2:]
    since, until = log_decays(g, pieces.ids, ROWS)
    inverse = unit_lower_inverse(_triangle(k, beta, since, pieces.ids))
    solve = (inverse * beta.reshape(batch, Hv, -1, 1, ROWS)).astype(k.dtype).reshape(batch, Hv, L, ROWS)
    decays = jnp.exp(jnp.stack([since, until], axis=2))
    turned = start.swapaxes(3, 4)
    launch: dict[str, Any] = {"stages": config.stages, "backward": backward}
    new, states, final, *left = pass_states(k, v, solve, decays, turned, pieces, **launch)
    final = jnp.where(pieces.occurs[..., None, None, None], final, turned).swapaxes(3, 4)
    # Value channels do not meet: a wide head is several heads of as many keys.
    P = 128 if dv % 128 == 0 else 64
    rows = jnp.repeat(jnp.stack([since * LOG2E, jnp.ones_like(since)], axis=2), dv // P, axis=1)
    launch = {"chunk": ROWS, "stages": 1, "name": "gated_delta_outputs"}
    cut = new.reshape(batch, L, -1, P), states.reshape(*states.shape[:2], -1, P, dk)
    o = outputs(cut[0], k, q, None, rows, pieces, cut[1], **launch)
    return (o.reshape(v.shape), final), (new, states, *left)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _rule(q, k, v, g, beta, start, pieces, config):
    """o and the final states of bfloat16 operands, whole to chunks; g and beta are [B, Hv, L]."""
    return _forward(q, k, v, g, beta, start, pieces, config, False)[0]


def _rule_fwd(q, k, v, g, beta, start, pieces, config):
    out, kept = _forward(q, k, v, g, beta, start, pieces, config, True)
    return out, (q, k, g, beta, pieces, *kept)


def _rule_bwd(config, kept, cotangents):
    q, k, g, beta, pieces, new, states, left = kept
    do, dfinal = cotangents
    batch, L, _, dk = q.shape
    Hv, dv = do.shape[2:]
    ids = pieces.ids
    since, until = log_decays(g, ids, ROWS)
    triangle, pull = jax.vjp(lambda k, beta, since: _triangle(k, beta, since, ids), k, beta, since)
    inverse = unit_lower_inverse(triangle).astype(k.dtype).reshape(batch, Hv, L, ROWS)
    fallen = jnp.exp(since)
    rows = jnp.stack([since * LOG2E, fallen, jnp.exp(until), beta * fallen], axis=2)
    turned = dfinal.swapaxes(3, 4)
    # Twice the operands of forward: of wide keys one chunk at a time fits shared memory.
    stages = 1 if dk > 128 else config.stages
    solved, dstates, dstart = pass_cotangents(q, k, do, inverse, rows, turned, pieces, stages=stages)
    dstart = jnp.where(pieces.occurs[..., None, None, None], dstart, turned).swapaxes(3, 4)
    # Of (I + N)^-1 w, N gets minus the cotangent of w times what tokens write: no inverse is differentiated.
    cut = (batch, -1, ROWS, Hv, dv)
    pairs = ("bcihv,bcjhv->bhcij", solved.reshape(cut), new.reshape(cut))
    overlaps_dk, dbeta, ends = pull(-contract(*pairs))
    wide = solved.astype(jnp.float32)
    dbeta = dbeta + jnp.sum(wide * left.astype(jnp.float32), axis=3).swapaxes(1, 2)
    wide = beta.swapaxes(1, 2)[..., None] * wide
    dv_ = wide.astype(do.dtype)
    # What follows is SSD's, of what tokens write instead of what they hold; of heads of 64, as wider ones would spill.
    P, parts = ROWS, dv // ROWS
    new, reads, do = (x.reshape(batch, L, -1, P) for x in (new, -dv_, do))
    states, dstates = (x.reshape(*x.shape[:2], -1, P, dk) for x in (states, dstates))
    rows = jnp.stack([since * LOG2E, jnp.ones_like(since), jnp.exp(until)], axis=2)
    rows = jnp.repeat(rows, parts, axis=1)
    inner = jnp.sum(states.astype(jnp.float32) * dstates.astype(jnp.float32), axis=(3, 4))
    launch: dict[str, Any] = {"chunk": ROWS, "tiles": ssd_tiles.Tiles()}
    dq, reach = output_gradients(
        new, do, k, q, rows, pieces, states, inner, name="gated_delta_query_gradients", **launch
    )
    none = jnp.zeros_like(inner)
    reads_dk, read = output_gradients(
        None, reads, k, k, rows, pieces, states, none, name="gated_delta_read_gradients", **launch
    )
    _, writes_dk, sums = input_gradients(
        new, do, k, q, None, rows, pieces, dstates, name="gated_delta_key_gradients", **launch
    )
    begun, stored = (_of_heads(sums[:, :, n], parts) for n in (1, 2))
    dg = log_decay_gradients(_of_heads(reach + read, parts) - begun + ends, stored, ids, ROWS)
    dk_ = (reads_dk.astype(jnp.float32) + writes_dk + overlaps_dk).astype(k.dtype)
    return dq, dk_, dv_, dg, dbeta, dstart, None


_rule.defvjp(_rule_fwd, _rule_bwd)


def run(q, k, v, g, beta, *, segment_ids, initial_state, num_segments, open_ends, chunk_size, operand_dtype):
    del chunk_size, operand_dtype
    batch, T, _, dk = q.shape
    Hv, dv = v.shape[2:]
    n, L, out_dtype = num_segments, -(-T // ROWS) * ROWS, v.dtype
    config = tiles("gated_delta", f"dk{dk} dv{dv}", Tiles())
    if segment_ids is not None:
        live = segment_ids > 0
        q, k, v, g, beta = (
            jnp.where(live.reshape(batch, T, *[1] * (x.ndim - 2)), x, 0) for x in (q, k, v, g, beta)
        )
    pieces = pieces_of(segment_ids, batch, T, L, ROWS, n, open_ends)
    q, k, v = (filled(x, L, jnp.bfloat16) for x in (q, k, v))
    g, beta = (filled(x, L, jnp.float32).swapaxes(1, 2) for x in (g, beta))
    if initial_state is None:
        initial_state = jnp.zeros((batch, n or 1, Hv, dk, dv), jnp.float32)
    out: Any = _rule(q, k, v, g, beta, initial_state.astype(jnp.float32), pieces, config)
    o, final = out
    return o[:, :T].astype(out_dtype), None if n is None else final
