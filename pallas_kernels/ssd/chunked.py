"""The chunked SSD scan and its hand-written adjoint.

Letters besides the house ones: c chunk, i and j tokens of a chunk (i later), Q their number, g group, e head of
the group, m = (head of the group, P).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.alignment import Aligned


def _einsum(spec, a, b, dtype):
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )


def _pick(states, document):
    return states[jnp.arange(states.shape[0]), document]


def _at(v, c) -> Any:
    """Chunk c of an array, or of each array of ``Aligned``."""
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, c, 1, keepdims=False), v)


def _put(v, c, value):
    return jax.lax.dynamic_update_index_in_dim(v, value, c, 1)


def _decays(a, G, ids):
    """Factors of a chunk's log decays [B, nc, Q, H]: pairwise, to the end, from the start, over the whole.

    A pair in different documents, a token not of the chunk's last document (to the end) and one not of the
    previous chunk's last document (from the start) get 0: what they would carry belongs to someone else.
    """
    rows, nc, Q, H = a.shape
    causal = jnp.tril(jnp.ones((Q, Q), bool))
    c = jnp.einsum("ij,bcjh->bchi", causal.astype(jnp.float32), a, precision="highest")
    mask = causal
    into, out, decay = jnp.exp(c[..., -1:] - c), jnp.exp(c), jnp.exp(c[..., -1])
    if ids is not None:
        last = ids[:, :, -1]
        before = jnp.concatenate([ids[:, :1, 0], last[:, :-1]], axis=1)
        mask = (causal & (ids[:, :, :, None] == ids[:, :, None, :]))[:, :, None]
        into = jnp.where((ids == last[:, :, None])[:, :, None], into, 0)
        out = jnp.where((ids == before[:, :, None])[:, :, None], out, 0)
        decay = jnp.where((last == before)[:, :, None], decay, 0)
    # Masked before the exponential: above the diagonal the difference is positive and may overflow.
    pair = jnp.exp(jnp.where(mask, c[..., :, None] - c[..., None, :], -jnp.inf))
    return pair.reshape(rows, nc, G, H // G, Q, Q), into.swapaxes(2, 3), out.swapaxes(2, 3), decay


def _heads_first(v, G):
    rows, nc, Q, H, P = v.shape
    return v.swapaxes(2, 3).reshape(rows, nc, G, H // G, Q, P)


def _tokens_first(v):
    rows, nc, G, E, Q, P = v.shape
    return v.reshape(rows, nc, G * E, Q, P).swapaxes(2, 3)


def _outer(v, weight, b, dtype):
    """Sum over a chunk's tokens of ``weight v`` [B, nc, Q, H, P] (outer) ``b`` [B, nc, G, Q, N]."""
    rows, nc, Q, H, P = v.shape
    G, N = b.shape[2], b.shape[4]
    # Weighted after the transpose: one folded into the product would leave XLA:CPU's bfloat16 path.
    columns = v.transpose(0, 1, 3, 4, 2) * weight.swapaxes(2, 3)[..., None, :]
    columns = columns.reshape(rows, nc, G, -1, Q)
    return _einsum("bcgmi,bcgin->bcgmn", columns, b, dtype).reshape(rows, nc, H, P, N)


def _project(S, b, dtype):
    """Each token's ``S b``: [B, nc, Q, H, P] from states [B, nc, H, P, N] and ``b`` [B, nc, G, Q, N]."""
    rows, nc, H, P, N = S.shape
    G, Q = b.shape[2:4]
    v = _einsum("bcgin,bcgmn->bcgim", b, S.reshape(rows, nc, G, -1, N), dtype)
    return v.swapaxes(2, 3).reshape(rows, nc, Q, H, P)


def _reduce(weighted, S, G, dtype):
    """Each token's ``weighted^T S`` summed over the heads of a group: [B, nc, G, Q, N]."""
    rows, nc, Q = weighted.shape[:3]
    weighted = weighted.astype(dtype).reshape(rows, nc, Q, G, -1).swapaxes(2, 3)
    return _einsum("bcgim,bcgmn->bcgin", weighted, S.reshape(rows, nc, G, -1, S.shape[-1]), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked_ssd(
    xb: Float[Array, "B nc Q H P"],
    a: Float[Array, "B nc Q H"],
    B: Float[Array, "B nc G Q N"],
    C: Float[Array, "B nc G Q N"],
    start: Float[Array, "B n H P N"],
    ids: Int[Array, "B nc Q"] | None,
    aligned: Aligned | None,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B nc Q H P"], Float[Array, "B n H P N"]]:
    """y without the skip, and the final states.

    Args:
        xb: ``dt x``, float32.
        a: log decays ``dt A``, float32, at most 0.
        B: input projections, float32.
        C: output projections, float32.
        start: initial states, float32; n = 1 unless ``aligned``.
        ids: non-decreasing document ids where chunks may hold several documents; then ``start`` is the first one's
            and the final state the last one's.
        aligned: where chunks open and close documents; None: the rows are one document, or ``ids`` tells.
        dtype: dtype of the operands of the matmuls.
    """
    outputs, _, _ = _forward(xb, a, B, C, start, ids, aligned, dtype)
    return outputs


def _forward(xb, a, B, C, start, ids, aligned, dtype):
    """Outputs, and what only the adjoint needs: the state before each chunk and what it gave y."""
    G = B.shape[2]
    pair, into, out, decay = _decays(a, G, ids)
    CB = _einsum("bcgin,bcgjn->bcgij", C, B, dtype)
    y = _tokens_first(_einsum("bcgeij,bcgejp->bcgeip", CB[:, :, :, None] * pair, _heads_first(xb, G), dtype))
    Z = _outer(xb, into, B, dtype)

    # Indexed inside the loop: handing the chunks over as scanned inputs would transpose all states twice.
    def step(carry, c):
        S, final, states = carry
        at = _at(aligned, c)
        if at is not None:
            S = jnp.where(at.opens[:, None, None, None], _pick(start, at.document), S)
        after = _at(decay, c)[..., None, None] * S + _at(Z, c)
        if at is not None:
            closed = jnp.where(at.closes[:, None, None, None], after, _pick(final, at.document))
            final = final.at[jnp.arange(final.shape[0]), at.document].set(closed)
        return (after, final, _put(states, c, S)), None

    carry = (start[:, 0], start, jnp.zeros_like(Z))
    (last, final, S), _ = jax.lax.scan(step, carry, jnp.arange(Z.shape[1]))
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
    CB = _einsum("bcgin,bcgjn->bcgij", C, B, dtype)
    faded = out[..., None] * dy
    weighted = into[..., None] * xb
    from_y = _outer(dy, out, C, dtype)

    def step(carry, c):
        dS, dstart, states = carry
        at = _at(aligned, c)
        if at is not None:
            dS = dS + jnp.where(at.closes[:, None, None, None], _pick(dfinal, at.document), 0)
        before = _at(decay, c)[..., None, None] * dS + _at(from_y, c)
        states = _put(states, c, dS)
        if at is not None:
            opened = jnp.where(at.opens[:, None, None, None], before, _pick(dstart, at.document))
            dstart = dstart.at[jnp.arange(dstart.shape[0]), at.document].set(opened)
            before = jnp.where(at.opens[:, None, None, None], 0, before)
        return (before, dstart, states), None

    # A document that does not occur hands its final state's cotangent straight to its initial state.
    carry = (
        dfinal[:, 0] if aligned is None else jnp.zeros_like(dfinal[:, 0]),
        dfinal,
        jnp.zeros_like(from_y),
    )
    (first, dstart, dS), _ = jax.lax.scan(step, carry, jnp.arange(S.shape[1]), reverse=True)

    dy_heads, xb_heads = _heads_first(dy, G), _heads_first(xb, G)
    dM = _einsum("bcgeip,bcgejp->bcgeij", dy_heads, xb_heads, dtype)
    dCB = jnp.sum(dM * pair, axis=3)
    within = _tokens_first(_einsum("bcgeij,bcgeip->bcgejp", CB[:, :, :, None] * pair, dy_heads, dtype))
    carried = _project(dS, B, dtype)
    dxb = within + into[..., None] * carried
    dC = _einsum("bcgij,bcgjn->bcgin", dCB, B, dtype) + _reduce(faded, S, G, dtype)
    dB = _einsum("bcgij,bcgin->bcgjn", dCB, C, dtype) + _reduce(weighted, dS, G, dtype)

    # A decay scales every pair it lies between, what enters the chunk, and what leaves it. The diagonal, which no
    # decay touches, stays out of the difference of sums: at strong decay it would drown the rest in rounding.
    strict = jnp.tril(jnp.ones((Q, Q), bool), -1)
    pairs = jnp.where(strict, dM * pair * CB[:, :, :, None], 0)
    spread = (jnp.sum(pairs, axis=5) - jnp.sum(pairs, axis=4)).reshape(*decay.shape, Q).swapaxes(2, 3)
    reach = spread + jnp.sum(dy * entering, axis=-1)
    stored = jnp.sum(weighted * carried, axis=-1)
    kept = decay * jnp.sum(S * dS, axis=(3, 4))
    causal = jnp.tril(jnp.ones((Q, Q)))
    da = jnp.einsum("ij,bcih->bcjh", causal, reach, precision="highest") + kept[:, :, None]
    da = da + jnp.einsum("ij,bcjh->bcih", jnp.tril(causal, -1), stored, precision="highest")
    return dxb, da, dB, dC, first[:, None] if aligned is None else dstart, None, None


chunked_ssd.defvjp(_chunked_fwd, _chunked_bwd)
