"""SSD as batched matmuls inside chunks and a short scan over chunk states (arXiv 2405.21060, section 6)."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.alignment import align, move
from pallas_kernels.materialise import hold, materialise
from pallas_kernels.segments import continued_ids, running_ids
from pallas_kernels.ssd.chunked import chunked_ssd

REASON = "chunked matmuls fused by XLA"

# Above this the work inside a chunk outgrows what the fewer states save, measured on CPU.
_MAX_CHUNK = 64


def supports(*_args, **_options) -> str | None:
    return None


def one_token(x, dt, A, B, C, D, state):
    """Decode: the recurrence itself, in float32, of x [B, H, P]; the state before it may be None."""
    rows, H, P = x.shape
    G, N = B.shape[1:]
    x, dt, B, C = (v.astype(jnp.float32) for v in (x, dt, B, C))
    # Held, as one array: fused into the update, all that leads to them would be done once per element of the state.
    parts = (jnp.exp(dt * A), dt[..., None] * x, B)
    held = materialise(jnp.concatenate([v.reshape(rows, -1) for v in parts], axis=1))
    decay, xb, B = (v.reshape(part.shape) for v, part in zip(jnp.split(held, [H, H + H * P], axis=1), parts))
    new = xb[..., None] * jnp.repeat(B, H // G, axis=1)[:, :, None, :]
    if state is not None:
        new = decay[..., None, None] * state.astype(jnp.float32) + new
    by_group = new.reshape(rows, G, -1, N)
    y = jnp.einsum("bgmn,bgn->bgm", by_group, C, precision="highest").reshape(rows, H, P)
    y = y if D is None else y + D[:, None] * x
    return y, new


def _chunked(x, dt, A, B, C, ids, start, aligned, Q, dtype):
    """y [B, T, H, P] without the skip, and the final states [B, n, H, P, N]."""
    rows, T, H, P = x.shape
    nc = -(-T // Q)

    def chunks(v, mode="constant"):
        v = jnp.pad(v, ((0, 0), (0, nc * Q - T), *[(0, 0)] * (v.ndim - 2)), mode=mode)
        return v.reshape(rows, nc, Q, *v.shape[2:])

    x, dt, B, C = (chunks(v.astype(jnp.float32)) for v in (x, dt, B, C))
    ids = None if ids is None else chunks(ids, "edge")
    # With one group a reshape: a transpose, even of a single group, would leave XLA:CPU's bfloat16 path.
    one = B.shape[3] == 1
    B, C = (v.reshape(rows, nc, 1, Q, -1) if one else v.swapaxes(2, 3) for v in (B, C))
    dtype = jnp.dtype(dtype or jnp.float32)
    outputs: Any = chunked_ssd(dt[..., None] * x, dt * A, B, C, start, ids, aligned, dtype)
    y, final = outputs
    return y.reshape(rows, nc * Q, H, P)[:, :T], final


def _aligned(x, dt, A, B, C, segment_ids, states, Q, dtype):
    """Every document moved to a chunk boundary: at most n extra chunks, no masks, exact states per document."""
    source, target, aligned = align(segment_ids, states.shape[1], Q)
    x, dt, B, C = (move(v, source, target) for v in (x, dt, B, C))
    y, final = _chunked(x, dt, A, B, C, None, states, aligned, Q, dtype)
    return move(y, target, source), final


def run(x, dt, A, B, C, D, *, segment_ids, initial_state, num_segments, open_ends, chunk_size, operand_dtype):
    rows, T, H, P = x.shape
    n = num_segments
    A = A.astype(jnp.float32)
    D = None if D is None else D.astype(jnp.float32)
    if segment_ids is not None:
        live = segment_ids > 0
        x, dt, B, C = (jnp.where(live.reshape(rows, T, *[1] * (v.ndim - 2)), v, 0) for v in (x, dt, B, C))
    if T == 1 and n in (None, 1):
        start = None if initial_state is None else initial_state[:, 0]
        y, state = one_token(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, start)
        return y[:, None].astype(x.dtype), None if n is None else state[:, None]
    x, dt, B, C = (materialise(v) for v in (x, dt, B, C))
    Q = min(chunk_size, _MAX_CHUNK, T)
    if initial_state is None:
        initial_state = jnp.zeros((rows, n or 1, H, P, B.shape[3]), jnp.float32)
    initial_state = initial_state.astype(jnp.float32)
    if n is not None and n > 1:
        y, final = _aligned(x, dt, A, B, C, segment_ids, initial_state, Q, operand_dtype)
    else:
        # With one document a row, padding (dt = 0) leaves the state alone and no mask is needed.
        # Held: the running maximum would be taken again for every pair of tokens.
        ids = None
        if segment_ids is not None and (n is None or open_ends):
            ids = hold(continued_ids(segment_ids) if open_ends else running_ids(segment_ids))
        y, final = _chunked(x, dt, A, B, C, ids, initial_state, None, Q, operand_dtype)
        final = None if n is None else final
    y = y if D is None else y + D[:, None] * x
    return materialise(y.astype(x.dtype)), final
