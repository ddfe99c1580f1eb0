"""Attention by blocks of queries, grouped so that no key or value is repeated, over the blocks of keys they can see."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.blocks import NO_KEY, NO_QUERY, visits_any, whole
from pallas_kernels.attention.mask import Marks, visible
from pallas_kernels.attention.options import Options
from pallas_kernels.materialise import hold
from pallas_kernels.precision import contract
from pallas_kernels.target import target

REASON = "query blocks of grouped matmuls fused by XLA"

_BLOCK = 128
# On CPU. Elsewhere one product over all keys is faster than a loop whose length is known only as it runs.
_KEYS = 512


def supports(*_args, **_options) -> str | None:
    return None


def _masked(scores, seen, soft_cap):
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(seen, scores, -jnp.inf)


def _seen(q_places, kv_places, window):
    """bool[B, t, S]; q_places: (positions, ids, mask or None) of the queries, kv_places: (positions, ids)."""
    positions, ids, mask = q_places
    return visible(Marks(positions, kv_places[0], ids, kv_places[1], mask), window)


def _softmax(scores):
    """exp(scores - max) over the last axis, its sum (1 where nothing is seen) and the log of the true sum."""
    peak = jnp.max(scores, axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = hold(jnp.exp(scores - peak))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    return weights, total, jnp.where(some, peak + jnp.log(total), -jnp.inf)


def _one_token(q, k, v, q_places, kv_places, window, soft_cap, kv_layout, dtype):
    """Decode: output [B, 1, H, d] and lse [B, 1, H] of scaled queries."""
    B, _, H, d = q.shape
    s, K = ("bksd", k.shape[1]) if kv_layout == "BKTD" else ("bskd", k.shape[2])
    rows = q.reshape(B, K, H // K, d)
    # The cache as left operand: three times faster on CPU for a few rows of queries.
    scores = contract(f"{s},bkmd->bksm", k, rows, operand_dtype=dtype).swapaxes(2, 3)
    seen = _seen(q_places, kv_places, window)[:, None]
    weights, total, lse = _softmax(_masked(scores, seen, soft_cap))
    out = contract(f"bkms,{s}->bkmd", weights, v, operand_dtype=dtype) / total
    return out.reshape(B, 1, H, d), lse.reshape(B, 1, H)


def _split(w, blocks, size):
    """[B, T, ...] to [blocks, B, size, ...], zero padded."""
    w = jnp.pad(w, ((0, 0), (0, blocks * size - w.shape[1]), *[(0, 0)] * (w.ndim - 2)))
    return w.reshape(w.shape[0], blocks, size, *w.shape[2:]).swapaxes(0, 1)


def _rows(w, K):
    """[blocks, B, t, H, ...] to [blocks, B, K, G, t, ...]: the queries of a group are rows of one matmul."""
    blocks, B, t, H = w.shape[:4]
    return jnp.moveaxis(w.reshape(blocks, B, t, K, H // K, *w.shape[4:]), 2, 4)


def _join(w, T):
    """[blocks, B, K, G, t, ...] back to [B, T, H, ...]."""
    blocks, B, K, G, t = w.shape[:5]
    return jnp.moveaxis(w, (0, 4), (1, 2)).reshape(B, blocks * t, K * G, *w.shape[5:])[:, :T]


def _over(blocks, step, carry, xs):
    """``lax.scan``, but a single block is not worth a loop."""
    if blocks > 1:
        return jax.lax.scan(step, carry, xs)
    carry, ys = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


def _einsum(spec, a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, q_places, kv_places, window, soft_cap, dtype):
    """Output [B, T, H, d] and lse [B, T, H] of scaled queries over k, v [B, K, S, d]; places as in :func:`_seen`."""
    return _attend_fwd(q, k, v, q_places, kv_places, window, soft_cap, dtype)[0]


def _blocked(w, K):
    """[B, T, H, ...] by blocks of queries, as :func:`_rows` has them."""
    T = w.shape[1]
    return _rows(_split(w, -(-T // _BLOCK), min(T, _BLOCK)), K)


def _operands(q, k, v, q_places, dtype):
    """Queries and their places by blocks, keys and values, all in memory."""
    T = q.shape[1]
    places = jax.tree.map(lambda w: _split(w, -(-T // _BLOCK), min(T, _BLOCK)), q_places)
    return hold(_blocked(q, k.shape[1]).astype(dtype)), hold(k.astype(dtype)), hold(v.astype(dtype)), places


class _At:
    """A block of keys: reads and adds to its part of arrays over all of them."""

    def __init__(self, start: Any, size: int, whole: bool):
        self._start, self._size, self._whole = start, size, whole

    def __call__(self, w, axis=2):
        return w if self._whole else jax.lax.dynamic_slice_in_dim(w, self._start, self._size, axis)

    def add(self, w, more):
        if self._whole:
            return w + more
        return jax.lax.dynamic_update_slice_in_dim(w, self(w) + more, self._start, 2)


class _Keys(NamedTuple):
    """Blocks of keys, and which of them each block of queries can see in any row of the batch.

    Attributes:
        size: keys of a block; the last one ends with the keys and may overlap the one before.
        total: S.
        places: (positions, ids) of all keys.
        order: i32[n, m], for each block of queries the blocks of keys it visits, in their order.
        count: i32[n], how many.
    """

    size: int
    total: int
    places: tuple[Any, Any]
    order: Any
    count: Any

    @classmethod
    def of(cls, queries, places, kv_places, window) -> "_Keys":
        n, t = queries.shape[0], queries.shape[4]
        S = kv_places[0].shape[1]
        size = _KEYS if S > _KEYS and target().platform == "cpu" else S
        if size == S:
            return cls(S, S, kv_places, jnp.zeros((n, 1), jnp.int32), jnp.ones(n, jnp.int32))
        positions, ids = (w.swapaxes(0, 1).reshape(w.shape[1], -1) for w in places[:2])
        seen = visits_any(
            whole(ids, positions, t, NO_QUERY),
            whole(kv_places[1], kv_places[0], size, NO_KEY),
            t,
            size,
            window,
        )
        return cls(size, S, kv_places, *seen)

    def block(self, order, turn):
        """Access to the block visited at a turn, its places and bool[size], which keys no earlier block had."""
        if self.size == self.total:
            return _At(0, self.size, True), self.places, True
        first = order[turn] * self.size
        start = jnp.minimum(first, self.total - self.size)
        at = _At(start, self.size, False)
        return at, tuple(at(w, 1) for w in self.places), jnp.arange(self.size) >= first - start

    def cut(self, q_places, at):
        """Places of queries with the mask's part of a block of keys."""
        positions, ids, mask = q_places
        return positions, ids, None if mask is None else at(mask)

    def over(self, count, attend, start):
        return attend(0, start) if self.size == self.total else jax.lax.fori_loop(0, count, attend, start)


def _attend_fwd(q, k, v, q_places, kv_places, window, soft_cap, dtype):
    T, K = q.shape[1], k.shape[1]
    queries, keys, values, places = _operands(q, k, v, q_places, dtype)
    kv = _Keys.of(queries, places, kv_places, window)

    def step(_, block):
        rows, places, order, count = block
        B, _, G, t, d = rows.shape

        def attend(turn, so_far):
            peak, total, out = so_far
            at, kv_side, fresh = kv.block(order, turn)
            scores = _einsum("bkmd,bksd->bkms", rows.reshape(B, K, G * t, d), at(keys)).reshape(
                B, K, G, t, -1
            )
            seen = (_seen(kv.cut(places, at), kv_side, window) & fresh)[:, None, None]
            scores = _masked(scores, seen, soft_cap)
            higher = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
            # A row that has seen nothing yet has no largest score: any finite one will do.
            level = jnp.where(higher == -jnp.inf, 0, higher)
            weights = hold(jnp.exp(scores - level))
            kept = jnp.exp(peak - level)
            more = _einsum("bkms,bksd->bkmd", weights.astype(dtype).reshape(B, K, G * t, -1), at(values))
            total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
            return higher, total, out * kept + more.reshape(rows.shape)

        row = (*rows.shape[:-1], 1)
        start = jnp.full(row, -jnp.inf), jnp.zeros(row), jnp.zeros(rows.shape, jnp.float32)
        peak, total, out = kv.over(count, attend, start)
        lse = peak + jnp.log(total)
        return None, (out / jnp.where(total > 0, total, 1), lse[..., 0])

    outputs: Any = _over(queries.shape[0], step, None, (queries, places, kv.order, kv.count))[1]
    out, lse = outputs
    like = tuple(jnp.zeros((0,), w.dtype) for w in (q, k, v))
    residuals = (queries, keys, values, places, kv_places, out, lse, like)
    return (_join(out, T), _join(lse, T)), residuals


def _attend_bwd(window, soft_cap, dtype, residuals, cotangents):
    """The scores are taken again, keys before queries: then only narrow operands are read transposed."""
    queries, keys, values, places, kv_places, out, lse, like = residuals
    T = cotangents[0].shape[1]
    blocks, B, K, G, t, d = queries.shape
    dout, dlse = (_rows(_split(w.astype(jnp.float32), blocks, t), K) for w in cotangents)
    shift = jnp.sum(dout * out, axis=-1) - dlse
    # A row that sees nothing has no weights: any finite log of their sum will do.
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    across = hold(keys.swapaxes(2, 3))
    kv = _Keys.of(queries, places, kv_places, window)

    def step(carry, block):
        rows, places, dout, lse, shift, order, count = block
        rows, dout = (w.reshape(B, K, G * t, d) for w in (rows, dout))

        def attend(turn, so_far):
            dq, dk, dv = so_far
            at, kv_side, fresh = kv.block(order, turn)
            scores = _einsum("bksd,bkmd->bksm", at(keys), rows).reshape(B, K, -1, G, t)
            seen = (_seen(kv.cut(places, at), kv_side, window) & fresh).swapaxes(1, 2)[:, None, :, None]
            scores = _masked(scores, seen, soft_cap)
            weights = hold(jnp.exp(scores - lse[:, :, None]))
            dweights = _einsum("bksd,bkmd->bksm", at(values), dout).reshape(weights.shape)
            dscores = weights * (dweights - shift[:, :, None])
            if soft_cap is not None:
                dscores = dscores * (1 - jnp.square(jnp.where(seen, scores, 0) / soft_cap))
            weights, dscores = (hold(w.astype(dtype)).reshape(B, K, -1, G * t) for w in (weights, dscores))
            dq = dq + _einsum("bkds,bksm->bkdm", at(across, 3), dscores)
            dk = at.add(dk, _einsum("bksm,bkmd->bksd", dscores, rows))
            dv = at.add(dv, _einsum("bksm,bkmd->bksd", weights, dout))
            return dq, dk, dv

        dq, dk, dv = kv.over(count, attend, (jnp.zeros((B, K, d, G * t)), *carry))
        return (dk, dv), dq.reshape(B, K, d, G, t)

    start = tuple(jnp.zeros(w.shape, jnp.float32) for w in (keys, values))
    blocked = (queries, places, hold(dout.astype(dtype)), lse, shift, kv.order, kv.count)
    (dk, dv), dq = _over(blocks, step, start, blocked)
    grads = (_join(jnp.moveaxis(dq, 3, 5), T), dk, dv)
    return *(g.astype(w.dtype) for g, w in zip(grads, like, strict=True)), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _sides(marks: Marks):
    """What :func:`_seen` takes."""
    return (marks.q_positions, marks.q_segment_ids, marks.mask), (marks.kv_positions, marks.kv_segment_ids)


def run(q, k, v, marks: Marks, options: Options):
    # Rounding a whole cache would cost more than the products of one token.
    asked = None if q.shape[1] == 1 else options.operand_dtype
    dtype = jnp.dtype(k.dtype if asked is None else asked)
    scaled = q.astype(jnp.float32) * options.scale
    given = (*_sides(marks), options.window, options.soft_cap)
    if q.shape[1] == 1:
        out, lse = _one_token(scaled, k, v, *given, options.kv_layout, dtype)
    else:
        if options.kv_layout == "BTKD":
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        outputs: Any = _attend(scaled, k, v, *given, dtype)
        out, lse = outputs
    return out.astype(q.dtype), lse


def backward(q, k, v, out, lse, dout, dlse, marks: Marks, options: Options):
    dtype = jnp.dtype(k.dtype if options.operand_dtype is None else options.operand_dtype)
    if options.kv_layout == "BTKD":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    q_places, kv_places = _sides(marks)
    scaled = q.astype(jnp.float32) * options.scale
    queries, keys, values, places = _operands(scaled, k, v, q_places, dtype)
    kept = tuple(_blocked(w.astype(jnp.float32), k.shape[1]) for w in (out, lse))
    like = tuple(jnp.zeros((0,), w.dtype) for w in (scaled, k, v))
    dlse = jnp.zeros_like(lse) if dlse is None else dlse
    residuals = (queries, keys, values, places, kv_places, *kept, like)
    dq, dk, dv, _, _ = _attend_bwd(options.window, options.soft_cap, dtype, residuals, (dout, dlse))
    if options.kv_layout == "BTKD":
        dk, dv = dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    return (dq * options.scale).astype(q.dtype), dk, dv
