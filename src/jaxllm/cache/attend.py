"""Attention over whatever a layer keeps: slots in one piece, rings, or pages under a policy."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.batch import Leaf, PackedBatch
from jaxllm.cache.options import AttendOptions
from jaxllm.cache.paged import PagedState, join, settle
from jaxllm.cache.paged_attention import extend_paged, learnt, slot_table, window_paged
from jaxllm.cache.policies.base import Seen
from jaxllm.cache.ring import RingState, first_positions, read_ring, write_ring
from jaxllm.cache.rows import RowState, read_rows_kv, write_rows_kv
from jaxllm.cache.segments import segments_of
from jaxllm.cache.window import committed_lengths, window_ancestors
from pallas_kernels import tree
from pallas_kernels.attention import attention, merge

AttentionState = RowState | RingState | PagedState
Reports = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionWindow:
    """``state`` before the window, the window itself, and its keys (after RoPE) and values, [B, W, K, d] each.

    Of pages also what their policy observes at the commit: queries [B, W, H, d], lse f32[B, W, H] and mass.
    """

    state: AttentionState
    batch: PackedBatch
    k: Leaf
    v: Leaf
    q: Leaf = None
    lse: Leaf = None
    mass: Leaf = None


def extend(
    state: AttentionState,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    batch: PackedBatch,
    options: AttendOptions,
) -> tuple[Float[Array, "B T H d"], AttentionState, Reports]:
    """A chunk or a decode step goes on from its slots: output, the layer after it, and taps."""
    if isinstance(state, PagedState):
        return extend_paged(state, q, k, v, batch, options)
    if isinstance(state, RingState):
        return _extend_ring(state, q, k, v, batch, options)
    state = write_rows_kv(state, batch, k, v)
    k, v, positions, owners = read_rows_kv(state, batch, options.bound)
    y = _attend(q, k, v, positions, owners, batch, options)
    return y, state, _reports(batch, k.shape[1], None, options)


def _extend_ring(
    state: RingState, q: Array, k: Array, v: Array, batch: PackedBatch, options: AttendOptions
) -> tuple[Array, RingState, Reports]:
    before = first_positions(batch)
    if batch.shape[1] == 1:
        # What the new token overwrites, no query sees any more.
        state = write_ring(state, batch, k, v)
        keys, values, positions, owners = read_ring(state, batch, before + batch.segment_ids)
    else:
        keys, values, positions, owners = read_ring(state, batch, before)
        keys, values = (_behind(old, new) for old, new in ((keys, k), (values, v)))
        positions = jnp.concatenate([positions, jnp.asarray(batch.positions)], axis=1)
        owners = jnp.concatenate([owners, jnp.asarray(batch.segment_ids)], axis=1)
        state = write_ring(state, batch, k, v)
    y = _attend(q, keys, values, positions, owners, batch, options)
    return y, state, _reports(batch, keys.shape[1], state.size, options)


def _behind(old: Float[Array, "B K R d"], new: Float[Array, "B T K d"]) -> Float[Array, "B K S d"]:
    """A chunk's keys, as the ring will keep them, behind those of the ring."""
    return jnp.concatenate([old, jnp.swapaxes(new, 1, 2).astype(old.dtype)], axis=2)


def _attend(
    q: Array, k: Array, v: Array, positions: Any, owners: Any, batch: PackedBatch, options: AttendOptions
) -> Array:
    return attention(
        q,
        k,
        v,
        q_positions=batch.positions,
        kv_positions=positions,
        q_segment_ids=batch.segment_ids,
        kv_segment_ids=owners,
        window=options.window,
        kv_layout="BKTD",
        operand_dtype=options.operand,
        implementation=options.implementation,
    )


def _reports(batch: PackedBatch, heads: int, most: int | None, options: AttendOptions) -> Reports:
    """Taps of a layer that reads all that it stores."""
    if not options.taps:
        return {}
    count = jnp.sum(jnp.asarray(batch.segment_ids) > 0, axis=1)
    stored = first_positions(batch)[:, 0] + count
    stored = stored if most is None else jnp.minimum(stored, most)
    read = jnp.broadcast_to(stored[:, None], (len(stored), heads)).astype(jnp.int32)
    known = {"kv_read": read, "kv_stored": read, "kv_recall": jnp.ones(read.shape, jnp.float32)}
    return {name: value for name, value in known.items() if name in options.taps}


def window(
    state: AttentionState,
    q: Float[Array, "B W H d"],
    k: Float[Array, "B W K d"],
    v: Float[Array, "B W K d"],
    batch: PackedBatch,
    options: AttendOptions,
) -> tuple[Float[Array, "B W H d"], AttentionWindow]:
    """Read on without writing: what the slot has committed, and of the window the node itself and its ancestors."""
    ancestors = window_ancestors(batch)
    if isinstance(state, PagedState):
        depths = tree.depths(ancestors)
        done = window_paged(state, q, k, v, batch, ancestors, depths, options)
        return done.out, AttentionWindow(state, batch, k, v, q, done.lse, done.mass)
    committed = committed_lengths(batch, ancestors)
    if isinstance(state, RingState):
        keys, values, positions, owners = read_ring(state, batch, committed)
    else:
        keys, values, positions, owners = read_rows_kv(state, batch, options.bound)
        owners = jnp.where(positions < committed, owners, 0)
    # As the slot would keep them, so that a window sees what later tokens will see.
    k, v = k.astype(keys.dtype), v.astype(values.dtype)
    attend = partial(
        attention,
        # The parts are merged before the output is rounded.
        q.astype(jnp.float32),
        q_positions=batch.positions,
        q_segment_ids=batch.segment_ids,
        window=options.window,
        operand_dtype=options.operand,
        return_lse=True,
        implementation=options.implementation,
    )
    before = attend(keys, values, kv_positions=positions, kv_segment_ids=owners, kv_layout="BKTD")
    within = attend(k, v, kv_positions=batch.positions, kv_segment_ids=batch.segment_ids, mask=ancestors)
    y, _ = merge(before, within)
    return y.astype(q.dtype), AttentionWindow(state, batch, k, v)


def commit(window: AttentionWindow, accepted: Bool[Array, "B W"]) -> AttentionState:
    """The accepted nodes join their slot in the order of their positions; past the capacity they are dropped."""
    state = window.state
    batch = window.batch.replace(segment_ids=accepted.astype(jnp.int32))
    if isinstance(state, RingState):
        return write_ring(state, batch, window.k, window.v)
    if isinstance(state, RowState):
        return write_rows_kv(state, batch, window.k, window.v)
    whole, segments = batch.slots is None, segments_of(batch, state.layout.slots)
    joined = join(state, segments, window.k, window.v, whole)
    table = slot_table(state, segments, whole, None)
    state = settle(state, joined, table)
    start = (joined.sealed + joined.before)[:, None]
    tokens = jnp.where(segments.rank >= 0, start + segments.rank, -1)
    seen = Seen(window.q, jnp.where(accepted, batch.positions, -1), tokens, window.lse, window.mass)
    return learnt(state, segments, table, whole, seen, None, reading=False)
