"""SSD as batched matmuls inside chunks and a short scan over chunk states (arXiv 2405.21060, section 6)."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.materialise import hold, materialise
from pallas_kernels.segments import extents, running_ids
from pallas_kernels.ssd.chunked import Aligned, chunked_ssd

REASON = "chunked matmuls fused by XLA; no GPU kernel of this op is present"

# Above this the work inside a chunk outgrows what the fewer states save, measured on CPU.
_MAX_CHUNK = 64


def supports(*_args, **_options) -> str | None:
    return None


def _one_token(x, dt, A, B, C, D, state):
    """Decode: the recurrence itself."""
    rows, _, H, P = x.shape
    G, N = B.shape[2:]
    x, dt, B, C = (v[:, 0].astype(jnp.float32) for v in (x, dt, B, C))
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
    return y[:, None], new


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


@jax.custom_vjp
def _move(v, source, target):
    """Row ``source[b, r]`` of v at row r, zeros where source is -1; ``target`` is the inverse map, likewise.

    Both directions gather: the transpose of a gather would be a scatter, which is slow on every device.
    """
    rows = jnp.take_along_axis(v, jnp.maximum(source, 0).reshape(*source.shape, *[1] * (v.ndim - 2)), axis=1)
    return jnp.where((source >= 0).reshape(*source.shape, *[1] * (v.ndim - 2)), rows, 0)


def _move_fwd(v, source, target):
    return _move(v, source, target), (source, target)


def _move_bwd(maps, g):
    source, target = maps
    return _move(g, target, source), None, None


_move.defvjp(_move_fwd, _move_bwd)


def _aligned(x, dt, A, B, C, segment_ids, states, Q, dtype):
    """Every document moved to a chunk boundary: at most n extra chunks, no masks, exact states per document."""
    T, n = segment_ids.shape[1], states.shape[1]
    nc = (T + n * (Q - 1)) // Q
    first, length = extents(segment_ids, n)
    ends = jnp.cumsum(-(-length // Q), axis=1)
    opening = ends - (-(-length // Q))
    index = jnp.maximum(segment_ids - 1, 0)

    def of_document(v, document):
        return jnp.take_along_axis(v, document, axis=1)

    target = jnp.arange(T) - of_document(first, index) + Q * of_document(opening, index)
    target = jnp.where(segment_ids > 0, target, -1)
    chunk = jnp.arange(nc)
    # Chunks past the last document's end belong to it too, as padding.
    document = jnp.minimum(jnp.sum(ends[:, None, :] <= chunk[:, None], axis=2), n - 1)
    offset = jnp.arange(nc * Q) - Q * jnp.repeat(of_document(opening, document), Q, axis=1)
    inside = offset < jnp.repeat(of_document(length, document), Q, axis=1)
    source = jnp.where(inside, offset + jnp.repeat(of_document(first, document), Q, axis=1), -1)
    x, dt, B, C = (_move(v, source, target) for v in (x, dt, B, C))
    occurs = of_document(length, document) > 0
    aligned = Aligned(
        document=document,
        opens=occurs & (chunk == of_document(opening, document)),
        closes=occurs & (chunk == of_document(ends, document) - 1),
    )
    y, final = _chunked(x, dt, A, B, C, None, states, aligned, Q, dtype)
    return _move(y, target, source), final


def run(x, dt, A, B, C, D, *, segment_ids, initial_state, num_segments, chunk_size, operand_dtype):
    rows, T, H, P = x.shape
    n = num_segments
    A = A.astype(jnp.float32)
    D = None if D is None else D.astype(jnp.float32)
    if segment_ids is not None:
        live = segment_ids > 0
        x, dt, B, C = (jnp.where(live.reshape(rows, T, *[1] * (v.ndim - 2)), v, 0) for v in (x, dt, B, C))
    if T == 1 and n in (None, 1):
        start = None if initial_state is None else initial_state[:, 0]
        y, state = _one_token(x, dt, A, B, C, D, start)
        return y.astype(x.dtype), None if n is None else state[:, None]
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
        ids = hold(running_ids(segment_ids)) if segment_ids is not None and n is None else None
        y, final = _chunked(x, dt, A, B, C, ids, initial_state, None, Q, operand_dtype)
        final = None if n is None else final
    y = y if D is None else y + D[:, None] * x
    return materialise(y.astype(x.dtype)), final
