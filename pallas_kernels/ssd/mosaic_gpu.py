"""SSD on Hopper GPUs through Mosaic: bfloat16 operands, float32 decays and states, states in memory between pieces only."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.common import LOG2E
from pallas_kernels.ssd.mosaic_gradients import input_gradients, output_gradients
from pallas_kernels.ssd.mosaic_outputs import outputs
from pallas_kernels.ssd.mosaic_states import pass_states
from pallas_kernels.ssd.pieces import Pieces, filled, log_decay_gradients, log_decays, pieces_of
from pallas_kernels.ssd.tiles import CHUNKS, Tiles
from pallas_kernels.tiles import tiles

REASON = "TMA and WGMMA kernels of our own: states passed from piece to piece, then every chunk at once"
BESIDE = (
    "casts, paddings, the list of the pieces (gathers of integers), the sums of log decays inside chunks and of their "
    "gradients, the inner products of states and their cotangents"
)

# Channels of a head, and of its state, that the kernels have tiles for.
SIZES = (64, 128)


def supports(x, _dt, _A, B, _C, _D, *, chunk_size, operand_dtype, **_options) -> str | None:
    if x.shape[1] == 1:
        return "a call of one token is float32 throughout"
    if operand_dtype is None or jnp.dtype(operand_dtype) != jnp.bfloat16:
        return f"operands are bfloat16, not {jnp.dtype(operand_dtype or jnp.float32).name}"
    for name, size in (("P", x.shape[3]), ("N", B.shape[3])):
        if size not in SIZES:
            return f"{name} = {size} is neither 64 nor 128"
    if chunk_size < min(CHUNKS):
        return f"chunk_size={chunk_size} is less than its smallest chunk of {min(CHUNKS)} tokens"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _scan(x, dt, A, B, C, D, start, pieces, Q, config):
    """y and the final states of bfloat16 operands, whole to chunks; dt is [B, H, L]."""
    return _forward(x, dt, A, B, C, D, start, pieces, Q, config)[0]


def _where_they_occur(pieces: Pieces, states, others):
    return jnp.where(pieces.occurs[..., None, None, None], states, others)


def _forward(x, dt, A, B, C, D, start, pieces, Q, config):
    """Outputs, and the state before each piece."""
    since, until = log_decays(dt * A[:, None], pieces.ids, Q)
    rows = jnp.stack([since * LOG2E, dt], axis=2)
    weights, decays = jnp.exp(until) * dt, jnp.exp(since)
    passed = (x, B, weights, decays, start, pieces.ids, pieces.table, pieces.counts)
    states, final = pass_states(*passed, chunk=Q, tiles=config)
    y = outputs(x, B, C, D, rows, pieces, states, chunk=Q, stages=config.stages)
    return (y, _where_they_occur(pieces, final, start)), states


def _scan_fwd(x, dt, A, B, C, D, start, pieces, Q, config):
    out, states = _forward(x, dt, A, B, C, D, start, pieces, Q, config)
    return out, (x, dt, A, B, C, D, pieces, states)


def _scan_bwd(Q, config, kept, cotangents):
    x, dt, A, B, C, D, pieces, states = kept
    dy, dfinal = cotangents
    launch = {"chunk": Q, "tiles": config}
    since, until = log_decays(dt * A[:, None], pieces.ids, Q)
    rows = jnp.stack([since * LOG2E, dt, jnp.exp(until)], axis=2)
    decays = jnp.exp(since)
    passed = (dy, C, decays, decays, dfinal, pieces.ids, pieces.backwards(), pieces.counts)
    dstates, dstart = pass_states(*passed, **launch)
    inner = jnp.sum(states.astype(jnp.float32) * dstates.astype(jnp.float32), axis=(3, 4))
    dC, reach = output_gradients(x, dy, B, C, rows, pieces, states, inner, **launch)
    dx, dB, sums = input_gradients(x, dy, B, C, D, rows, pieces, dstates, **launch)
    direct, begun, stored = (sums[:, :, n] for n in range(3))
    # What a pair passes through lies between its ends: the later token's sum less the earlier one's.
    da = log_decay_gradients(reach - begun, stored, pieces.ids, Q)
    dD = None if D is None else jnp.sum(x.astype(jnp.float32) * dy.astype(jnp.float32), axis=(0, 1, 3))
    dA = jnp.sum(dt * da, axis=(0, 2))
    return dx, direct + A[:, None] * da, dA, dB, dC, dD, _where_they_occur(pieces, dstart, dfinal), None


_scan.defvjp(_scan_fwd, _scan_bwd)


def run(x, dt, A, B, C, D, *, segment_ids, initial_state, num_segments, open_ends, chunk_size, operand_dtype):
    del operand_dtype
    batch, T, H, P = x.shape
    N, n = B.shape[3], num_segments
    config = tiles("ssd", f"P{P} N{N}", Tiles())
    Q = max(size for size in CHUNKS if size <= min(chunk_size, config.chunk))
    L = -(-T // Q) * Q
    narrow = x
    if segment_ids is not None:
        live = segment_ids > 0
        narrow, dt, B, C = (
            jnp.where(live.reshape(batch, T, *[1] * (v.ndim - 2)), v, 0) for v in (x, dt, B, C)
        )
    pieces = pieces_of(segment_ids, batch, T, L, Q, n, open_ends)
    narrow, B, C = (filled(v, L, jnp.bfloat16) for v in (narrow, B, C))
    dt = filled(dt, L, jnp.float32).swapaxes(1, 2)
    if initial_state is None:
        initial_state = jnp.zeros((batch, n or 1, H, P, N), jnp.float32)
    A, D = A.astype(jnp.float32), None if D is None else D.astype(jnp.float32)
    start = initial_state.astype(jnp.float32)
    out: Any = _scan(narrow, dt, A, B, C, D, start, pieces, Q, config)
    y, final = out
    return y[:, :T].astype(x.dtype), None if n is None else final
