"""The host's decisions on the device: an :class:`Update` of the allocator, applied to the cache between two steps."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxllm.cache.paged import PagedState, PageGroup
from jaxllm.cache.recurrent import RecurrentState
from jaxllm.cache.ring import RingState
from jaxllm.cache.state import Cache
from jaxllm.cache.update import Copies, Starts, Update


def init_snapshots(cache: Cache, count: int) -> tuple[Any, ...]:
    """Room for ``count`` snapshots of recurrent states and rings: ``[R, ...]`` in place of ``[S, ...]``, else None."""

    def room(state: Any) -> Any:
        if not isinstance(state, RecurrentState | RingState):
            return None
        return jax.tree.map(lambda pool: jnp.zeros((count, *pool.shape[1:]), pool.dtype), state)

    return tuple(room(state) for state in cache.layers)


def applied(cache: Cache, snapshots: tuple[Any, ...], update: Update) -> tuple[Cache, tuple[Any, ...]]:
    """Tables, page copies, starts and saves of ``update``.

    Every instruction reads the arrays as they were before; indices past the end are padding.

    Args:
        cache: with tables of an allocator (``init_cache`` with ``pages``).
        snapshots: of :func:`init_snapshots`.
        update: of ``Allocator.flush``.
    """
    starts, saves = update.starts, update.saves
    layers, kept = [], []
    for state, snapshot in zip(cache.layers, snapshots):
        if snapshot is not None:
            layers.append(_put(state, starts.slots, _states(state, snapshot, starts.state)))
            kept.append(_put(snapshot, saves.snapshots, _states(state, snapshot, saves.state)))
            continue
        layers.append(_paged(state, starts, update.copies) if isinstance(state, PagedState) else state)
        kept.append(None)
    groups = tuple(
        _group(group, update.slots, rows, starts) for group, rows in zip(cache.groups, update.tables)
    )
    return Cache(tuple(layers), groups), tuple(kept)


def _put(pools: Any, at: Any, values: Any) -> Any:
    if not len(at):
        return pools
    return jax.tree.map(lambda pool, value: pool.at[at].set(value, mode="drop"), pools, values)


def _states(state: Any, snapshot: Any, source: Int[np.ndarray | Array, " m"]) -> Any:
    """[m, ...] from slots (0 .. S - 1), snapshots (S + r) or nothing (-1: zeros)."""

    def one(pool: Array, kept: Array) -> Array:
        slots = len(pool)
        in_slots = jnp.where(source < 0, slots, jnp.minimum(source, slots))
        in_snapshots = jnp.where(source < slots, len(kept), source - slots)
        held = pool.at[in_slots].get(mode="fill", fill_value=0)
        if not len(kept):
            return held
        saved = kept.at[in_snapshots].get(mode="fill", fill_value=0)
        return jnp.where((source < slots).reshape(-1, *[1] * (pool.ndim - 1)), held, saved)

    return jax.tree.map(one, state, snapshot)


def _paged(state: PagedState, starts: Starts, copies: tuple[Copies, ...]) -> PagedState:
    """Pages are copied with what belongs to them; forks get their parent's tails, all others fresh per-slot arrays."""
    mine = copies[state.group]

    def copied(pool: Array) -> Array:
        if not len(mine.target):
            return pool
        return pool.at[mine.target].set(pool[mine.source], mode="drop")

    def begun(pool: Array) -> Array:
        if not len(starts.slots):
            return pool
        values = pool.at[_parents(starts, len(pool))].get(mode="fill", fill_value=0)
        return pool.at[starts.slots].set(values, mode="drop")

    memory = replace(
        state.memory,
        per_page=jax.tree.map(copied, state.memory.per_page),
        per_slot=jax.tree.map(begun, state.memory.per_slot),
    )
    k, v = (jax.tree.map(copied, pool) for pool in (state.k, state.v))
    return replace(state, k=k, v=v, tail_k=begun(state.tail_k), tail_v=begun(state.tail_v), memory=memory)


def _parents(starts: Starts, slots: int) -> Any:
    """Where what belongs to a slot is copied from; a slot past the end: from nowhere."""
    return jnp.where(starts.tail < 0, slots, starts.tail)


def _group(group: PageGroup, slots: Any, rows: Any, starts: Starts) -> PageGroup:
    table = group.table if not len(slots) else group.table.at[slots].set(rows, mode="drop")
    if not len(starts.slots):
        return replace(group, table=table)
    parents = _parents(starts, len(group.length))

    def begun(pool: Array) -> Array:
        values = jnp.where(starts.tail < 0, starts.tokens, pool.at[parents].get(mode="fill", fill_value=0))
        return pool.at[starts.slots].set(values, mode="drop")

    return PageGroup(table, begun(group.length), begun(group.sealed))
