"""Slot pools of recurrent layers: a fixed number of values for every slot, read and written by segment."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.batch import Leaf, PackedBatch


class RecurrentState:
    """A layer whose whole memory of a slot is a fixed number of values: ``[S, ...]`` pools, zeroed at admission."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MatrixState(RecurrentState):
    """conv [S, k-1, channels]: last raw inputs of the convolution; matrix f32[S, heads, ., .]: the recurrence's state."""

    conv: Leaf
    matrix: Leaf


def drop(slots: Any, size: int) -> Any:
    """Slot -1 becomes an index past the end, which scatters drop and gathers fill with zeros."""
    return jnp.where(slots < 0, size, slots)


def read_rows(pool: Float[Array, "S ..."], batch: PackedBatch) -> Float[Array, "B n ..."]:
    """The recurrent state of every segment of ``batch``; zeros for slot -1."""
    if batch.slots is None:
        return pool[: batch.shape[0], None]
    return pool.at[drop(batch.slots, len(pool))].get(mode="fill", fill_value=0)


def write_rows(pool: Float[Array, "S ..."], batch: PackedBatch, value: Float[Array, "B n ..."]) -> Any:
    """``pool`` with the segments' new states; slot -1 is dropped."""
    value = value.astype(pool.dtype)
    if batch.slots is None:
        rows = batch.shape[0]
        return value[:, 0] if rows == len(pool) else pool.at[:rows].set(value[:, 0])
    return pool.at[drop(batch.slots, len(pool))].set(value, mode="drop")
