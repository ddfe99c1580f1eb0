"""The gated delta rule as batched matmuls inside chunks and a short scan over chunk states (arXiv 2412.06464).

Letters besides the house ones: c chunk, b row, h key head, e value head of the key head, i and j tokens of a chunk (i
later), Q their number, k and v the two sides of the state. Chunks come first, so that the scan slices them for free.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.alignment import align, move
from pallas_kernels.gated_delta.triangular import unit_lower_inverse
from pallas_kernels.materialise import materialise
from pallas_kernels.precision import contract
from pallas_kernels.segments import continued_ids, running_ids

REASON = "chunked matmuls fused by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def one_token(q, k, v, g, beta, state):
    """Decode: the recurrence itself, of q [B, H, dk], with the state read once for both the write and the output.

    The state before it may be None. Returns o and the state after it, in float32.
    """
    rows, H, dk = q.shape
    Hv, dv = v.shape[1:]
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))
    qk = jnp.sum(q * k, axis=-1)
    if state is None:
        state = jnp.zeros((rows, Hv, dk, dv), jnp.float32)
    S = state.astype(jnp.float32).reshape(rows, H, Hv // H, dk, dv)
    decay = jnp.exp(g).reshape(rows, H, -1, 1)
    # One product for both: reading the state is most of the work.
    read = jnp.einsum("bhekv,bhjk->bhejv", S, jnp.stack([k, q], axis=2), precision="highest")
    write = beta.reshape(decay.shape) * (v.reshape(rows, H, -1, dv) - decay * read[:, :, :, 0])
    o = decay * read[:, :, :, 1] + qk[..., None, None] * write
    # Held, as one array: fused into the update, all that leads to them would be done once per element of the state.
    parts = (decay, k, write)
    held = materialise(jnp.concatenate([x.reshape(rows, -1) for x in parts], axis=1))
    ends = (Hv, Hv + H * dk)
    decay, k, write = (x.reshape(part.shape) for x, part in zip(jnp.split(held, ends, axis=1), parts))
    S = decay[..., None] * S + k[:, :, None, :, None] * write[..., None, :]
    return o.reshape(rows, Hv, dv), S.reshape(rows, Hv, dk, dv)


def _product(dtype):
    """Two-operand einsum with operands and cotangents in ``dtype``."""
    if dtype is None or jnp.dtype(dtype) == jnp.float32:
        # Nothing to round: what `contract` would hold in memory for backward costs a fifth of the gradient here.
        return partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return partial(contract, operand_dtype=dtype)


def _decays(g, ids):
    """Factors of a chunk's log decays [c, b, h, e, Q]: pairwise, to the end, from the start, over the whole.

    A pair in different documents, a token not of the chunk's last document (to the end) and one not of the previous
    chunk's last document (from the start) get 0: what they would carry belongs to someone else.
    """
    Q = g.shape[-1]
    mask = jnp.tril(jnp.ones((Q, Q), bool))
    total = jnp.einsum("ij,cbhej->cbhei", mask.astype(jnp.float32), g, precision="highest")
    into, out, decay = jnp.exp(total[..., -1:] - total), jnp.exp(total), jnp.exp(total[..., -1])
    if ids is not None:
        last = ids[..., -1:]
        before = jnp.concatenate([ids[:1, :, :1], last[:-1]])
        mask = (mask & (ids[..., :, None] == ids[..., None, :]))[:, :, None, None]
        into = jnp.where((ids == last)[:, :, None, None], into, 0)
        out = jnp.where((ids == before)[:, :, None, None], out, 0)
        decay = jnp.where((last == before)[:, :, None], decay, 0)
    # Masked before the exponential: above the diagonal the difference is positive and may overflow.
    pair = jnp.exp(jnp.where(mask, total[..., :, None] - total[..., None, :], -jnp.inf))
    return pair, into, out, decay


def _factors(q, k, v, g, beta, ids, product):
    """What each chunk does to a state, whatever the state: reads [W; out q], writes U, keys, decay, and scores."""
    pair, into, out, decay = _decays(g, ids)
    strict = jnp.tril(jnp.ones(pair.shape[-2:], bool), -1)
    overlap = product("cbhik,cbhjk->cbhij", k, k)[:, :, :, None]
    T = unit_lower_inverse(jnp.where(strict, beta[..., None] * overlap * pair, 0))
    U = product("cbheij,cbhejv->cbheiv", T * beta[..., None, :], v)
    W = product("cbheij,cbhjk->cbheik", T * (beta * out)[..., None, :], k)
    scores = product("cbhik,cbhjk->cbhij", q, k)[:, :, :, None] * pair
    reads = jnp.concatenate([W, out[..., None] * q[:, :, :, None]], axis=-2)
    return reads, U, into[..., None] * k[:, :, :, None], decay, scores


def _chunked(q, k, v, g, beta, ids, start, aligned, Q, dtype):
    """o [B, T, Hv, dv], and the final states [B, n, Hv, dk, dv]."""
    rows, T, H, dk = q.shape
    Hv, dv = v.shape[2:]
    E, nc = Hv // H, -(-T // Q)
    product = _product(dtype)

    def chunks(x, mode="constant", *, heads=()):
        x = jnp.pad(x, ((0, 0), (0, nc * Q - T), *[(0, 0)] * (x.ndim - 2)), mode=mode)
        x = x.reshape(rows, nc, Q, *heads, *x.shape[3:])
        return jnp.moveaxis(x, (1, 2), (0, 2 + len(heads)))

    q, k = (chunks(x.astype(jnp.float32), heads=(H,)) for x in (q, k))
    v, g, beta = (chunks(x.astype(jnp.float32), heads=(H, E)) for x in (v, g, beta))
    ids = None if ids is None else chunks(ids, "edge")
    reads, U, keys, decay, scores = _factors(q, k, v, g, beta, ids, product)
    start = start.reshape(rows, -1, H, E, dk, dv)
    b = jnp.arange(rows)

    def step(carry, chunk):
        S, final = carry
        reads, U, keys, decay, at = chunk
        if at is not None:
            S = jnp.where(at.opens[:, None, None, None, None], start[b, at.document], S)
        read = product("bheik,bhekv->bheiv", reads, S)
        new = U - read[..., :Q, :]
        S = decay[..., None, None] * S + product("bheik,bheiv->bhekv", keys, new)
        if at is not None:
            closed = jnp.where(at.closes[:, None, None, None, None], S, final[b, at.document])
            final = final.at[b, at.document].set(closed)
        return (S, final), (new, read[..., Q:, :])

    at = jax.tree.map(lambda x: x.T, aligned)
    final = None if aligned is None else start
    (last, final), (new, entering) = jax.lax.scan(step, (start[:, 0], final), (reads, U, keys, decay, at))
    o = entering + product("cbheij,cbhejv->cbheiv", scores, new)
    o = jnp.moveaxis(o, (0, 4), (1, 2)).reshape(rows, nc * Q, Hv, dv)[:, :T]
    final = last[:, None] if final is None else final
    return o, final.reshape(rows, -1, Hv, dk, dv)


def run(q, k, v, g, beta, *, segment_ids, initial_state, num_segments, open_ends, chunk_size, operand_dtype):
    rows, T, _, dk = q.shape
    Hv, dv = v.shape[2:]
    n, out_dtype = num_segments, v.dtype
    if segment_ids is not None:
        live = segment_ids > 0
        arrays = (q, k, v, g, beta)
        q, k, v, g, beta = (jnp.where(live.reshape(rows, T, *[1] * (x.ndim - 2)), x, 0) for x in arrays)
    if T == 1 and n in (None, 1):
        start = None if initial_state is None else initial_state[:, 0]
        o, state = one_token(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], start)
        return o[:, None].astype(out_dtype), None if n is None else state[:, None]
    Q = min(chunk_size, T)
    if initial_state is None:
        initial_state = jnp.zeros((rows, n or 1, Hv, dk, dv), jnp.float32)
    initial_state = initial_state.astype(jnp.float32)
    if n is not None and n > 1:
        assert segment_ids is not None
        # Every document at a chunk boundary: at most n extra chunks, no masks, exact states per document.
        source, target, aligned = align(segment_ids, n, Q)
        q, k, v, g, beta = (move(x, source, target) for x in (q, k, v, g, beta))
        o, final = _chunked(q, k, v, g, beta, None, initial_state, aligned, Q, operand_dtype)
        o = move(o, target, source)
    else:
        # With one document a row, padding (g = beta = 0) leaves the state alone and no mask is needed.
        ids = None
        if segment_ids is not None and (n is None or open_ends):
            ids = continued_ids(segment_ids) if open_ends else running_ids(segment_ids)
        o, final = _chunked(q, k, v, g, beta, ids, initial_state, None, Q, operand_dtype)
    return o.astype(out_dtype), None if n is None else final
