"""Rings: a sliding window's layer keeps the last R tokens of a slot, position p in place p mod R."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.batch import Leaf, PackedBatch
from jaxllm.cache.bits import store
from jaxllm.cache.rows import read_slots, side_by_side, token_slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingState:
    """Keys and values of one layer, [S, K, R, d] each; R is the window (and what may be rolled back), or the capacity
    where that is less. bfloat16 as its bits. A token at or past ``capacity`` is not kept."""

    k: Leaf
    v: Leaf
    capacity: int = field(metadata={"static": True})

    @property
    def size(self) -> int:
        """R."""
        return self.k.shape[2]


def first_positions(batch: PackedBatch) -> Int[Array, "B n"]:
    """Position of each segment's first token: the tokens that its slot holds already."""
    n = 1 if batch.slots is None else batch.slots.shape[1]
    mine = jnp.asarray(batch.segment_ids)[:, None] == jnp.arange(1, n + 1)[:, None]
    last = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(mine, jnp.asarray(batch.positions)[:, None], last), axis=2)
    return jnp.where(first == last, 0, first)


def write_ring(
    state: RingState, batch: PackedBatch, k: Float[Array, "B T K d"], v: Float[Array, "B T K d"]
) -> RingState:
    """``state`` with the last R of every segment's tokens."""
    slots = len(state.k)
    owner = token_slots(batch, slots)
    owner = jnp.where(batch.positions < state.capacity, owner, slots)
    if batch.shape[1] > 1:
        ids = jnp.asarray(batch.segment_ids)
        same = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, None, :]
        kept = jnp.minimum(jnp.asarray(batch.positions), state.capacity - 1)
        later = jnp.where(same, kept[:, None, :], -1)
        # Two tokens that share a place must not both be written: their order is undefined.
        owner = jnp.where(jnp.max(later, axis=2) - batch.positions < state.size, owner, slots)
    at = jnp.maximum(batch.positions, 0) % state.size
    return replace(
        state,
        k=state.k.at[owner, :, at].set(store(k, state.k.dtype), mode="drop"),
        v=state.v.at[owner, :, at].set(store(v, state.v.dtype), mode="drop"),
    )


def read_ring(
    state: RingState, batch: PackedBatch, length: Int[Array, "B n"]
) -> tuple[Float[Array, "B K nR d"], Float[Array, "B K nR d"], Int[Array, "B nR"], Int[Array, "B nR"]]:
    """Keys, values, their positions and their segment ids, 0 where a place holds nothing of its slot's request.

    Args:
        state: one layer.
        batch: names the slots; n segments per row.
        length: tokens that each segment's slot holds.
    """
    k, v = (side_by_side(read_slots(pool, batch, state.size)) for pool in (state.k, state.v))
    rows, n = length.shape
    place, last = jnp.arange(state.size, dtype=jnp.int32), length[..., None] - 1
    positions = last - (last - place) % state.size
    owners = jnp.where(positions >= 0, jnp.arange(1, n + 1, dtype=jnp.int32)[:, None], 0)
    return k, v, positions.reshape(rows, -1), owners.reshape(rows, -1)
