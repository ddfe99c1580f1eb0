"""A sum over shards in their global order, whoever computed them: its bits do not depend on who that was."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from parallel.order import there


def sum_in_order(
    rows: Float[Array, "k size"], shards: Int[Array, "m k"], axis: str
) -> tuple[Float[Array, " size"], Array]:
    """``(((0 + r_0) + r_1) + ...)`` over the rows of shards 0, 1, ...; call it under ``shard_map``.

    Every device gets its part of all rows, adds them up in order, and the parts are gathered: k + 1 times the bytes of
    ``rows[0]`` travel to a device, where a sum in an order of the network's own takes 2.

    Args:
        rows: of this device's slots.
        shards: of every device's slots, -1 where a slot is idle; the same on all devices.
        axis: the mesh axis of the m devices.

    Returns:
        the sum, the same on all devices, and a bool[] that is true once it is there (:func:`parallel.order.there`).
    """
    m, (slots, size) = len(shards), rows.shape
    width = -(-size // m)
    parts = jnp.pad(rows, ((0, 0), (0, m * width - size))).reshape(slots, m, width)
    parts = jax.lax.all_to_all(parts, axis, split_axis=1, concat_axis=0).reshape(m * slots, width)
    numbers = shards.reshape(-1)
    order = jnp.argsort(jnp.where(numbers < 0, m * slots, numbers), stable=True)

    def add(place: Array, total: Array) -> Array:
        return total + jax.lax.dynamic_index_in_dim(parts, order[place], keepdims=False)

    total = jax.lax.fori_loop(0, jnp.sum(numbers >= 0), add, jnp.zeros((width,), rows.dtype))
    whole = jax.lax.all_gather(total, axis, tiled=True)[:size]
    return whole, there(whole)
