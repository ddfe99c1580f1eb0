"""SSD as batched matmuls inside chunks and a short scan over chunk states (arXiv 2405.21060, section 6)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.precision import contract
from pallas_kernels.segments import extents, running_ids

REASON = "chunked matmuls fused by XLA; no GPU kernel of this op is present"

# Above this the work inside a chunk outgrows what the fewer states save, measured on CPU.
_MAX_CHUNK = 64


class _Entry(NamedTuple):
    """Chunks before which the state is replaced by a document's initial state, on chunk-aligned rows."""

    opens: Bool[Array, "nc B"]
    document: Int[Array, "nc B"]


def supports(*_args, **_options) -> str | None:
    return None


def _one_token(x, dt, A, B, C, D, state):
    """Decode: the recurrence itself."""
    rows, _, H, P = x.shape
    G, N = B.shape[2:]
    x, dt, B, C = (v[:, 0].astype(jnp.float32) for v in (x, dt, B, C))
    write = (dt[..., None] * x).reshape(rows, G, -1, P, 1) * B[:, :, None, None, :]
    if state is not None:
        decay = jnp.exp(dt * A).reshape(rows, G, -1, 1, 1)
        write = write + decay * state.astype(jnp.float32).reshape(rows, G, -1, P, N)
    y = jnp.sum(write * C[:, :, None, None, :], axis=-1).reshape(rows, H, P)
    y = y if D is None else y + D[:, None] * x
    return y[:, None], write.reshape(rows, H, P, N)


def _scan_states(decay, Z, start, entry: _Entry | None):
    """States before each chunk [nc, B, H, P, N] and after the last, from (decay, Z) of every chunk.

    ``start`` is [B, H, P, N], or [B, n, H, P, N] where ``entry`` says which document opens which chunk.
    """
    if entry is None:
        carry = start
        opens = document = jnp.zeros((Z.shape[0], 0), jnp.int32)
    else:
        carry = jnp.zeros_like(start[:, 0])
        opens, document = entry

    def step(S, chunk):
        decay, Z, opens, document = chunk
        if entry is not None:
            opening = start[jnp.arange(Z.shape[0]), document]
            S = jnp.where(opens[:, None, None, None], opening, S)
        return decay[..., None, None] * S + Z, S

    return jax.lax.scan(step, carry, (decay, Z, opens, document))


def _chunked(x, dt, A, B, C, ids, start, entry, Q, dtype):
    """y without the skip, the states before each chunk, the state after the last, and each chunk's (decay, Z)."""
    rows, T, H, P = x.shape
    G, N = B.shape[2:]
    E, nc = H // G, -(-T // Q)

    def chunks(v):
        v = jnp.pad(v, ((0, 0), (0, nc * Q - T), *[(0, 0)] * (v.ndim - 2)))
        return v.reshape(rows, nc, Q, *v.shape[2:]).swapaxes(0, 1)

    dt = chunks(dt.astype(jnp.float32))
    # Heads lead: every matmul then has its batch axes first and needs no hidden transpose.
    xb = (
        (chunks(x).astype(jnp.float32) * dt[..., None]).transpose(0, 1, 3, 2, 4).reshape(nc, rows, G, E, Q, P)
    )
    B, C = (chunks(v).transpose(0, 1, 3, 2, 4) for v in (B, C))
    causal = jnp.tril(jnp.ones((Q, Q), bool))
    a = (dt * A).swapaxes(2, 3).reshape(nc, rows, G, E, Q)
    c = jnp.einsum("cbgei,ji->cbgej", a, causal.astype(jnp.float32), precision="highest")
    total = c[..., -1:]
    into, out = jnp.exp(total - c), jnp.exp(c)
    decay = jnp.exp(total[..., 0])
    mask = causal
    if ids is not None:
        ids = jnp.pad(ids, ((0, 0), (0, nc * Q - T)), mode="edge").reshape(rows, nc, Q).swapaxes(0, 1)
        last = ids[:, :, -1]
        before = jnp.concatenate([ids[:1, :, 0], last[:-1]])
        mask = (causal & (ids[:, :, :, None] == ids[:, :, None, :]))[:, :, None, None]
        into = into * (ids == last[:, :, None])[:, :, None, None]
        out = out * (ids == before[:, :, None])[:, :, None, None]
        decay = decay * (last == before)[:, :, None, None]
    L = jnp.exp(jnp.where(mask, c[..., :, None] - c[..., None, :], -jnp.inf))
    CB = contract("cbgin,cbgjn->cbgij", C, B, operand_dtype=dtype)
    y = contract("cbgeij,cbgejp->cbgeip", CB[:, :, :, None] * L, xb, operand_dtype=dtype)
    weighted = (into[..., None] * xb).transpose(0, 1, 2, 3, 5, 4).reshape(nc, rows, G, E * P, Q)
    Z = contract("cbgmj,cbgjn->cbgmn", weighted, B, operand_dtype=dtype).reshape(nc, rows, H, P, N)
    decay = decay.reshape(nc, rows, H)
    final, S = _scan_states(decay, Z, start, entry)
    carried = contract("cbgmn,cbgin->cbgmi", S.reshape(nc, rows, G, E * P, N), C, operand_dtype=dtype)
    y = y + out[..., None] * carried.reshape(nc, rows, G, E, P, Q).swapaxes(4, 5)
    y = y.reshape(nc, rows, H, Q, P).transpose(1, 0, 3, 2, 4).reshape(rows, nc * Q, H, P)[:, :T]
    return y, S, final, decay, Z


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
    rows, T = segment_ids.shape
    n = states.shape[1]
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
    moved = [_move(v, source, target) for v in (x, dt, B, C)]
    entry = _Entry((chunk == of_document(opening, document)).T, document.T)
    y, S, _, decay, Z = _chunked(moved[0], moved[1], A, moved[2], moved[3], None, states, entry, Q, dtype)
    at = (jnp.maximum(ends - 1, 0), jnp.arange(rows)[:, None])
    final = decay[at][..., None, None] * S[at] + Z[at]
    final = jnp.where((length > 0)[:, :, None, None, None], final, states)
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
    Q = min(chunk_size, _MAX_CHUNK, T)
    if initial_state is None:
        initial_state = jnp.zeros((rows, n or 1, H, P, B.shape[3]), jnp.float32)
    initial_state = initial_state.astype(jnp.float32)
    if n is not None and n > 1:
        y, final = _aligned(x, dt, A, B, C, segment_ids, initial_state, Q, operand_dtype)
    else:
        # With one document a row, padding (dt = 0) leaves the state alone and no mask is needed.
        ids = running_ids(segment_ids) if segment_ids is not None and n is None else None
        y, _, final, _, _ = _chunked(x, dt, A, B, C, ids, initial_state[:, 0], None, Q, operand_dtype)
        final = None if n is None else final[:, None]
    y = y if D is None else y + D[:, None] * x
    return y.astype(x.dtype), final
