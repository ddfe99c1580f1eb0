"""Slots in one piece: every position of a slot has its place in ``[S, K, capacity, d]``."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.batch import Leaf, PackedBatch
from jaxllm.cache.bits import load, store


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowState:
    """Keys and values of one layer, [S, K, capacity, d] each; bfloat16 as its bits."""

    k: Leaf
    v: Leaf

    @property
    def capacity(self) -> int:
        """Most tokens of a slot."""
        return self.k.shape[2]


def token_slots(batch: PackedBatch, slots: int) -> Any:
    """i32[B, T]: the slot of each token; an index past the end for padding and slot -1."""
    if batch.slots is None:
        owner = jnp.arange(batch.shape[0], dtype=jnp.int32)[:, None]
        return jnp.where(batch.segment_ids > 0, owner, slots)
    owner = jnp.take_along_axis(batch.slots, jnp.maximum(batch.segment_ids - 1, 0), axis=1)
    return jnp.where((batch.segment_ids > 0) & (owner >= 0), owner, slots)


def write_rows_kv(
    state: RowState, batch: PackedBatch, k: Float[Array, "B T K d"], v: Float[Array, "B T K d"]
) -> RowState:
    """``state`` with every valid token's key and value at (its slot, its position)."""
    slots = len(state.k)
    owner = token_slots(batch, slots)
    # A position past the capacity, or any of padding, must not reach another slot.
    owner = jnp.where((owner < slots) & (batch.positions < state.capacity), owner, slots)
    at = jnp.maximum(batch.positions, 0)
    return replace(
        state,
        k=state.k.at[owner, :, at].set(store(k, state.k.dtype), mode="drop"),
        v=state.v.at[owner, :, at].set(store(v, state.v.dtype), mode="drop"),
    )


def read_slots(pool: Leaf, batch: PackedBatch, bound: int) -> Float[Array, "B n K L d"]:
    """The first ``bound`` entries of the slot of every segment, as floats; zeros for slot -1."""
    if batch.slots is None:
        return load(pool[: batch.shape[0], None, :, :bound])
    slots = jnp.where(batch.slots < 0, len(pool), batch.slots)
    return load(pool[:, :, :bound].at[slots].get(mode="fill", fill_value=0))


def side_by_side(read: Float[Array, "B n K L d"]) -> Float[Array, "B K nL d"]:
    """What a row's segments hold as one sequence of keys."""
    rows, segments, heads, length, d = read.shape
    if segments == 1:
        return read[:, 0]
    return jnp.moveaxis(read, 2, 1).reshape(rows, heads, segments * length, d)


def read_rows_kv(
    state: RowState, batch: PackedBatch, bound: int | None
) -> tuple[Float[Array, "B K L d"], Float[Array, "B K L d"], Int[Array, "B L"], Int[Array, "B L"]]:
    """Keys, values, their positions and their segment ids for every row, L = n * bound.

    Args:
        state: one layer.
        batch: names the slots; n segments per row.
        bound: positions read of each slot; at least every row's length. None reads the capacity.
    """
    bound = state.capacity if bound is None else min(bound, state.capacity)
    k, v = (side_by_side(read_slots(pool, batch, bound)) for pool in (state.k, state.v))
    rows, _, length, _ = k.shape
    index = jnp.arange(length, dtype=jnp.int32)
    positions = jnp.broadcast_to(index % bound, (rows, length))
    return k, v, positions, jnp.broadcast_to(index // bound + 1, (rows, length))
