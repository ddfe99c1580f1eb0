"""Expert parallelism: rows travel to the device that has their expert and back, dropless, with static shapes.

XLA:CPU has no ragged all-to-all, and a buffer for the worst case (every row to one device) would be as many times larger
as there are devices. So rows travel in rounds of a fixed capacity: in one round when the load is about even, in as many
as the fullest device needs when it is not. A round that no device needs is skipped; one beyond the first is recomputed in
backward, so that memory does not grow with the imbalance. No row is ever dropped, and rows keep their arithmetic: a row
meets the same weights, whatever travels beside it.
"""

from collections.abc import Callable
from math import ceil

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import from_experts, plan, to_experts

AXIS = "expert"
Compute = Callable[[Array, Array], Array]


def through_experts(
    rows: Float[Array, "M D"],
    sizes: Int[Array, "E"],
    compute: Compute,
    *,
    devices: int,
    capacity: float,
) -> Float[Array, "M D"]:
    """What ``compute`` makes of the rows of all devices along `AXIS`, each on the device of its expert.

    Call it under ``shard_map``. Device i has the experts i * E / devices and the following.

    Args:
        rows: this device's rows sorted by expert; those past the last expert's belong to none.
        sizes: rows of each of all E experts here.
        compute: ``(rows, sizes) -> rows`` over the rows of this device's own E / devices experts, sorted by expert; zeros
            past them.
        devices: along `AXIS`; a divisor of E.
        capacity: rows between two devices in one round, over an even share of M.

    Returns:
        results in the order of ``rows``; zero for rows of no expert.
    """
    count, width = rows.shape
    room = min(count, ceil(capacity * count / devices))
    mine = sizes.reshape(devices, -1)
    total = jnp.sum(mine, axis=1)
    end = jnp.cumsum(total)
    start = end - total
    before = jnp.cumsum(mine, axis=1) - mine
    slot = jnp.arange(room, dtype=jnp.int32)
    index = jnp.arange(count, dtype=jnp.int32)
    home = jnp.sum(end <= index[:, None], axis=1)
    offset = index - start[jnp.minimum(home, devices - 1)]

    def one(number: Array) -> Array:
        first = number * room
        place = first + slot
        source = jnp.where(place < total[:, None], start[:, None] + place, count)
        sent = rows.at[source].get(mode="fill", fill_value=0)
        counts = jnp.clip(before + mine - first, 0, room) - jnp.clip(before - first, 0, room)
        got, counts = (jax.lax.all_to_all(x, AXIS, 0, 0) for x in (sent, counts))
        # Each device's rows come sorted by expert; past them is padding, of the expert that there is not.
        ids = jnp.sum(jnp.cumsum(counts, axis=1)[:, None] <= slot[:, None], axis=2)
        places = plan(ids.reshape(-1, 1), counts.shape[1])
        made = compute(to_experts(got.reshape(-1, width), places), places.sizes)
        ones = jnp.ones((devices * room, 1), jnp.float32)
        made = from_experts(made, ones, places).reshape(devices, room, -1)
        back = jax.lax.all_to_all(made, AXIS, 0, 0)
        here = (home < devices) & (offset >= first) & (offset < first + room)
        found = back[jnp.minimum(home, devices - 1), jnp.clip(offset - first, 0, room - 1)]
        return jnp.where(here[:, None], found, 0)

    y = one(jnp.zeros((), jnp.int32))
    rounds = -(-count // room)
    if rounds == 1:
        return y
    fullest = jax.lax.pmax(jnp.max(total), AXIS)

    @jax.checkpoint
    def needed(number: Array) -> Array:
        return jax.lax.cond(number * room < fullest, one, lambda _: jnp.zeros_like(y), number)

    def more(y: Array, number: Array) -> tuple[Array, None]:
        return y + needed(number), None

    return jax.lax.scan(more, y, jnp.arange(1, rounds, dtype=jnp.int32))[0]
