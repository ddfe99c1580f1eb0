"""Which blocks of keys a block of queries can see, decided before the kernel runs from each block's extremes.

Rows may stand in any order: a block is skipped only where no pair of its extremes could be visible, and counted as
wholly visible only where every pair is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

_LEAST, _MOST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


# Ids of no document, one for queries and one for keys, so that padding does not see padding.
NO_QUERY, NO_KEY = _LEAST, _LEAST + 1


class Places(NamedTuple):
    """Document and position of every row, blocks made whole; padding has the id ``NO_QUERY`` or ``NO_KEY``.

    ``words`` are those of a mask (:mod:`pallas_kernels.attention.bits`), or None without one.
    """

    ids: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    words: Int[Array, "B w L"] | None = None


def whole(
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    block: int,
    hidden: int,
    words: Int[Array, "B w T"] | None = None,
) -> Places:
    """Rows filled up to whole blocks with padding, whose id (0 until now) becomes ``hidden``."""
    fill = ((0, 0), (0, -segment_ids.shape[1] % block))
    ids = jnp.where(segment_ids == 0, hidden, segment_ids.astype(jnp.int32))
    return Places(
        jnp.pad(ids, fill, constant_values=hidden),
        jnp.pad(positions.astype(jnp.int32), fill),
        None if words is None else jnp.pad(words, ((0, 0), *fill)),
    )


class _Extremes(NamedTuple):
    first: Int[Array, "B ..."]
    last: Int[Array, "B ..."]
    least: Int[Array, "B ..."]
    most: Int[Array, "B ..."]
    single: Bool[Array, "B ..."]


def _extremes(places: Places, block: int) -> _Extremes:
    ids, positions = (w.reshape(w.shape[0], -1, block) for w in (places.ids, places.positions))
    live = ids > NO_KEY
    first = jnp.min(jnp.where(live, ids, _MOST), axis=2)
    last = jnp.max(jnp.where(live, ids, _LEAST), axis=2)
    least = jnp.min(jnp.where(live, positions, _MOST), axis=2)
    most = jnp.max(jnp.where(live, positions, _LEAST), axis=2)
    return _Extremes(first, last, least, most, jnp.all(live, axis=2) & (first == last))


class Visits(NamedTuple):
    """For each block of one side, the blocks of the other to visit: wholly visible ones first, then the rest.

    ``order[b, i, :counts[b, i, 1]]`` are the blocks, the first ``counts[b, i, 0]`` of them without a hidden pair.
    """

    order: Int[Array, "B n m"]
    counts: Int[Array, "B n 2"]


def _listed(some: Bool[Array, "B n m"], every: Bool[Array, "B n m"]) -> Visits:
    every = every & some
    rest = some & ~every
    free = jnp.sum(every, axis=2, dtype=jnp.int32)
    counts = jnp.stack([free, free + jnp.sum(rest, axis=2, dtype=jnp.int32)], axis=2)
    m = some.shape[2]
    # Each visited block's place in the list; the others go past the end and are dropped.
    place = jnp.where(every, jnp.cumsum(every, axis=2), free[..., None] + jnp.cumsum(rest, axis=2)) - 1
    place = jnp.where(some, place, m).astype(jnp.int32)

    def fill(places):
        return jnp.zeros(m, jnp.int32).at[places].set(jnp.arange(m, dtype=jnp.int32), mode="drop")

    return Visits(jax.vmap(jax.vmap(fill))(place), counts)


def _pairs(queries: Places, keys: Places, block_q: int, block_kv: int) -> tuple[_Extremes, _Extremes]:
    """Extremes of blocks of queries [B, n, 1] and of keys [B, 1, m]."""
    q, kv = _extremes(queries, block_q), _extremes(keys, block_kv)
    return _Extremes(*(w[:, :, None] for w in q)), _Extremes(*(w[:, None, :] for w in kv))


def _some(q: _Extremes, kv: _Extremes, window: int | None) -> Bool[Array, "B n m"]:
    some = (q.last >= kv.first) & (q.first <= kv.last) & (q.most >= kv.least)
    return some if window is None else some & (q.least - kv.most < window)


def visits_any(
    queries: Places, keys: Places, block_q: int, block_kv: int, window: int | None
) -> tuple[Int[Array, "n m"], Int[Array, " n"]]:
    """The blocks of keys each block of queries visits in any row of the batch, in their order, and how many.

    In their order, so that what a row gets does not depend on the other rows: a block of which it sees nothing changes
    no bit of a running softmax.
    """
    some = jnp.any(_some(*_pairs(queries, keys, block_q, block_kv), window), axis=0)
    order = jnp.argsort(~some, axis=1, stable=True)
    return order.astype(jnp.int32), jnp.sum(some, axis=1, dtype=jnp.int32)


def visits(
    queries: Places, keys: Places, block_q: int, block_kv: int, window: int | None, *, by_key: bool = False
) -> Visits:
    """The blocks of keys each block of queries visits; with ``by_key`` the blocks of queries of each block of keys."""
    q, kv = _pairs(queries, keys, block_q, block_kv)
    some = _some(q, kv, window)
    every = q.single & kv.single & (q.first == kv.first) & (q.least >= kv.most)
    if queries.words is not None:
        # What the mask leaves of a block is not known before the kernel runs.
        every = jnp.zeros_like(every)
    if window is not None:
        every &= q.most - kv.least < window
    if by_key:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    return _listed(some, every)
