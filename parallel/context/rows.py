"""A worker's tokens as the rows that its scans read, and how a program takes lanes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from pallas_kernels.alignment import move
from parallel.context.lanes import Lanes

Axis = str | tuple[str, ...]


def lane_specs(axis: Axis) -> Lanes:
    """How ``jax.shard_map`` hands lanes to the workers along ``axis``: their own tokens, and everyone's order."""
    everyones = ("order", "first", "after", "halo")
    specs: Any = {name: PartitionSpec(*([] if name in everyones else [axis])) for name in Lanes._fields}
    return Lanes(**specs)


def check_lanes(lanes: Lanes, axis: Axis, rows: tuple[int, ...]) -> int:
    """The workers along ``axis``.

    Raises:
        ValueError: the lanes are of more or fewer workers, not sharded by :func:`lane_specs`, or of other slots than
            ``rows`` [S, block, ...].
    """
    workers = jax.lax.axis_size(axis)
    own, count, size = lanes.segment_ids.shape
    slots = count - lanes.moved.shape[1]
    if own != 1 or lanes.after.shape[0] != workers:
        raise ValueError(
            f"lanes of {lanes.after.shape[0]} workers, {own} of them here: must be {workers} along axis {axis!r}, one "
            "on each device (see lane_specs)"
        )
    if rows[:2] != (slots, size):
        raise ValueError(
            f"rows of shape {rows}: must begin with the lanes' slots and block, ({slots}, {size})"
        )
    return workers


def to_lanes(values: Shaped[Array, "S T ..."], lanes: Lanes) -> Shaped[Array, "L T ..."]:
    """Tokens of a worker's slots in its lanes; what has left a slot is padding there, by ``segment_ids``."""
    extra, size = lanes.moved.shape[1:]
    if not extra:
        return values
    flat = values.reshape(1, -1, *values.shape[2:])
    left = move(flat, lanes.moved.reshape(1, -1), lanes.moved_to.reshape(1, -1))
    return jnp.concatenate([values, left.reshape(extra, size, *values.shape[2:])])


def from_lanes(values: Shaped[Array, "L T ..."], lanes: Lanes) -> Shaped[Array, "S T ..."]:
    """The inverse of :func:`to_lanes`."""
    extra = lanes.moved.shape[1]
    if not extra:
        return values
    stayed, left = values[:-extra], values[-extra:]
    back = move(
        left.reshape(1, -1, *left.shape[2:]), lanes.moved_to.reshape(1, -1), lanes.moved.reshape(1, -1)
    )
    here = (lanes.moved_to[0] < 0).reshape(*stayed.shape[:2], *[1] * (stayed.ndim - 2))
    return jnp.where(here, stayed, back.reshape(stayed.shape))
