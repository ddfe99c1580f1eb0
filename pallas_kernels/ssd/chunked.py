"""The chunked SSD scan and its hand-written adjoint.

Letters besides the house ones: c chunk, i and j tokens of a chunk (i later), Q their number, g group, e head of
the group, m = (head of the group, P).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


class Aligned(NamedTuple):
    """Documents that begin and end on chunk boundaries, so that the states pass through any number of them."""

    document: Int[Array, "nc B"]
    opens: Bool[Array, "nc B"]
    closes: Bool[Array, "nc B"]


def _einsum(spec, a, b, dtype):
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )


def _pick(states, document):
    return states[jnp.arange(states.shape[0]), document]


def _decays(a, G, ids):
    """Factors of a chunk's log decays [nc, B, Q, H]: pairwise, to the end, from the start, over the whole.

    A pair in different documents, a token not of the chunk's last document (to the end) and one not of the
    previous chunk's last document (from the start) get 0: what they would carry belongs to someone else.
    """
    nc, rows, Q, H = a.shape
    causal = jnp.tril(jnp.ones((Q, Q), bool))
    c = jnp.einsum("ij,cbjh->cbhi", causal.astype(jnp.float32), a, precision="highest")
    mask = causal
    into, out, decay = jnp.exp(c[..., -1:] - c), jnp.exp(c), jnp.exp(c[..., -1])
    if ids is not None:
        last = ids[:, :, -1]
        before = jnp.concatenate([ids[:1, :, 0], last[:-1]])
        mask = (causal & (ids[:, :, :, None] == ids[:, :, None, :]))[:, :, None]
        into = jnp.where((ids == last[:, :, None])[:, :, None], into, 0)
        out = jnp.where((ids == before[:, :, None])[:, :, None], out, 0)
        decay = jnp.where((last == before)[:, :, None], decay, 0)
    # Masked before the exponential: above the diagonal the difference is positive and may overflow.
    pair = jnp.exp(jnp.where(mask, c[..., :, None] - c[..., None, :], -jnp.inf))
    return pair.reshape(nc, rows, G, H // G, Q, Q), into.swapaxes(2, 3), out.swapaxes(2, 3), decay


def _heads_first(v, G):
    nc, rows, Q, H, P = v.shape
    return v.swapaxes(2, 3).reshape(nc, rows, G, H // G, Q, P)


def _tokens_first(v):
    nc, rows, G, E, Q, P = v.shape
    return v.reshape(nc, rows, G * E, Q, P).swapaxes(2, 3)


def _outer(weighted, b, dtype):
    """Sum over a chunk's tokens of ``weighted`` [nc, B, Q, H, P] (outer) ``b`` [nc, B, G, Q, N]."""
    nc, rows, Q, H, P = weighted.shape
    G, N = b.shape[2], b.shape[4]
    columns = weighted.astype(dtype).reshape(nc, rows, Q, G, -1).transpose(0, 1, 3, 4, 2)
    return _einsum("cbgmi,cbgin->cbgmn", columns, b, dtype).reshape(nc, rows, H, P, N)


def _project(S, b, dtype):
    """Each token's ``S b``: [nc, B, Q, H, P] from states [nc, B, H, P, N] and ``b`` [nc, B, G, Q, N]."""
    nc, rows, H, P, N = S.shape
    G, Q = b.shape[2:4]
    v = _einsum("cbgin,cbgmn->cbgim", b, S.reshape(nc, rows, G, -1, N), dtype)
    return v.swapaxes(2, 3).reshape(nc, rows, Q, H, P)


def _reduce(weighted, S, G, dtype):
    """Each token's ``weighted^T S`` summed over the heads of a group: [nc, B, G, Q, N]."""
    nc, rows, Q = weighted.shape[:3]
    weighted = weighted.astype(dtype).reshape(nc, rows, Q, G, -1).swapaxes(2, 3)
    return _einsum("cbgim,cbgmn->cbgin", weighted, S.reshape(nc, rows, G, -1, S.shape[-1]), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked_ssd(
    xb: Float[Array, "nc B Q H P"],
    a: Float[Array, "nc B Q H"],
    B: Float[Array, "nc B G Q N"],
    C: Float[Array, "nc B G Q N"],
    start: Float[Array, "B n H P N"],
    ids: Int[Array, "nc B Q"] | None,
    aligned: Aligned | None,
    dtype: DTypeLike,
) -> tuple[Float[Array, "nc B Q H P"], Float[Array, "B n H P N"]]:
    """y without the skip, and the final states.

    Args:
        xb: ``dt x``, float32.
        a: log decays ``dt A``, float32, at most 0.
        B: input projections, float32.
        C: output projections, float32.
        start: initial states, float32; n = 1 unless ``aligned``.
        ids: non-decreasing document ids where chunks may hold several documents; then ``start`` must be 0.
        aligned: where chunks open and close documents; None: the rows are one document, or ``ids`` tells.
        dtype: dtype of the operands of the matmuls.
    """
    return _forward(xb, a, B, C, start, ids, aligned, dtype)[0]


def _forward(xb, a, B, C, start, ids, aligned, dtype):
    G = B.shape[2]
    pair, into, out, decay = _decays(a, G, ids)
    CB = _einsum("cbgin,cbgjn->cbgij", C, B, dtype)
    y = _tokens_first(_einsum("cbgeij,cbgejp->cbgeip", CB[:, :, :, None] * pair, _heads_first(xb, G), dtype))
    Z = _outer(into[..., None] * xb, B, dtype)

    def step(carry, chunk):
        S, final = carry
        decay, Z, at = chunk
        if at is not None:
            S = jnp.where(at.opens[:, None, None, None], _pick(start, at.document), S)
        after = decay[..., None, None] * S + Z
        if at is not None:
            kept = jnp.where(at.closes[:, None, None, None], after, _pick(final, at.document))
            final = final.at[jnp.arange(final.shape[0]), at.document].set(kept)
        return (after, final), S

    carry = (start[:, 0], None if aligned is None else start)
    (last, final), S = jax.lax.scan(step, carry, (decay, Z, aligned))
    entering = out[..., None] * _project(S, C, dtype)
    return (y + entering, last[:, None] if aligned is None else final), S, entering


def _chunked_fwd(xb, a, B, C, start, ids, aligned, dtype):
    outputs, S, entering = _forward(xb, a, B, C, start, ids, aligned, dtype)
    return outputs, (xb, a, B, C, ids, aligned, S, entering)


def _chunked_bwd(dtype, residuals, cotangents):
    xb, a, B, C, ids, aligned, S, entering = residuals
    dy, dfinal = cotangents
    G, Q = B.shape[2:4]
    pair, into, out, decay = _decays(a, G, ids)
    CB = _einsum("cbgin,cbgjn->cbgij", C, B, dtype)
    faded = out[..., None] * dy
    weighted = into[..., None] * xb

    def step(carry, chunk):
        dS, dstart = carry
        decay, from_y, at = chunk
        if at is not None:
            dS = dS + jnp.where(at.closes[:, None, None, None], _pick(dfinal, at.document), 0)
        before = decay[..., None, None] * dS + from_y
        if at is not None:
            kept = jnp.where(at.opens[:, None, None, None], before, _pick(dstart, at.document))
            dstart = dstart.at[jnp.arange(dstart.shape[0]), at.document].set(kept)
            return (jnp.where(at.opens[:, None, None, None], 0, before), dstart), dS
        return (before, None), dS

    # A document that does not occur hands its final state's cotangent straight to its initial state.
    carry = (dfinal[:, 0], None) if aligned is None else (jnp.zeros_like(dfinal[:, 0]), dfinal)
    (first, dstart), dS = jax.lax.scan(step, carry, (decay, _outer(faded, C, dtype), aligned), reverse=True)

    dy_heads, xb_heads = _heads_first(dy, G), _heads_first(xb, G)
    dM = _einsum("cbgeip,cbgejp->cbgeij", dy_heads, xb_heads, dtype)
    dCB = jnp.sum(dM * pair, axis=3)
    within = _tokens_first(_einsum("cbgeij,cbgeip->cbgejp", CB[:, :, :, None] * pair, dy_heads, dtype))
    carried = _project(dS, B, dtype)
    dxb = within + into[..., None] * carried
    dC = _einsum("cbgij,cbgjn->cbgin", dCB, B, dtype) + _reduce(faded, S, G, dtype)
    dB = _einsum("cbgij,cbgin->cbgjn", dCB, C, dtype) + _reduce(weighted, dS, G, dtype)

    # A decay scales every pair it lies between, what enters the chunk, and what leaves it. The diagonal, which no
    # decay touches, stays out of the difference of sums: at strong decay it would drown the rest in rounding.
    strict = jnp.tril(jnp.ones((Q, Q), bool), -1)
    pairs = jnp.where(strict, dM * pair * CB[:, :, :, None], 0)
    spread = (jnp.sum(pairs, axis=5) - jnp.sum(pairs, axis=4)).reshape(*decay.shape, Q).swapaxes(2, 3)
    reach = spread + jnp.sum(dy * entering, axis=-1)
    stored = jnp.sum(weighted * carried, axis=-1)
    kept = decay * jnp.sum(S * dS, axis=(3, 4))
    causal = jnp.tril(jnp.ones((Q, Q)))
    da = jnp.einsum("ij,cbih->cbjh", causal, reach, precision="highest") + kept[:, :, None]
    da = da + jnp.einsum("ij,cbjh->cbih", jnp.tril(causal, -1), stored, precision="highest")
    return dxb, da, dB, dC, first[:, None] if aligned is None else dstart, None, None


chunked_ssd.defvjp(_chunked_fwd, _chunked_bwd)
