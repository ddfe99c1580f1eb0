"""The segments of a batch, row after row, as the cache reads and writes them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxllm.batch import PackedBatch


class Segments(NamedTuple):
    """V = B n segments.

    Attributes:
        slots: i32[V], S where a segment has none.
        order: i32[V, T], place in its row of each segment's tokens, by position; anything past ``count``.
        count: i32[V], tokens.
        rows: i32[V], the batch row.
        rank: i32[B, T], number of each token among those of its segment; -1 for padding and slotless segments.
    """

    slots: Any
    order: Any
    count: Any
    rows: Any
    rank: Any


def segments_of(batch: PackedBatch, slots: int) -> Segments:
    """Of a batch over pools of ``slots``; a slot outside them is none."""
    B, T = batch.shape
    n = 1 if batch.slots is None else batch.slots.shape[1]
    owner = jnp.arange(B, dtype=jnp.int32)[:, None] if batch.slots is None else jnp.asarray(batch.slots)
    ids = jnp.asarray(batch.segment_ids)
    mine = ids[:, None, :] == jnp.arange(1, n + 1)[None, :, None]
    count = jnp.sum(mine, axis=2, dtype=jnp.int32)
    good = (owner >= 0) & (owner < slots)
    last = jnp.iinfo(jnp.int32).max
    key = jnp.where(mine, jnp.asarray(batch.positions)[:, None, :], last)
    order = jnp.argsort(key, axis=2).astype(jnp.int32) if T > 1 else jnp.zeros((B, n, 1), jnp.int32)
    rank = jnp.where(mine, jnp.argsort(order, axis=2) if T > 1 else 0, -1)
    rank = jnp.max(jnp.where(good[..., None], rank, -1), axis=1)
    return Segments(
        slots=jnp.where(good, owner, slots).reshape(-1),
        order=order.reshape(-1, T),
        count=jnp.where(good, count, 0).reshape(-1),
        rows=jnp.repeat(jnp.arange(B, dtype=jnp.int32), n),
        rank=rank.astype(jnp.int32),
    )


def by_segment(value: Array, segments: Segments) -> Array:
    """[B, T, ...] as [V, T, ...], each segment's tokens first and in order."""
    if value.shape[1] == 1 and len(segments.rows) == len(value):
        return value
    return value[segments.rows[:, None], segments.order]
