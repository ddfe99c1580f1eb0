"""Rows of a step and the slots of a pool that they read and write, shared by the decode steps of the recurrent ops."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from pallas_kernels.arguments import require, require_booleans, require_integers, require_shape


def require_slots(
    slots: Int[Array, "B"] | None, live: Bool[Array, "B"] | None, rows: int, pool: Shaped[Array, "S ..."]
) -> None:
    """Raise unless there is a slot for every row, and shapes and dtypes are those of ``rows`` rows."""
    require_shape("slots", slots, (rows,), "B")
    require_shape("live", live, (rows,), "B")
    require_integers(slots=slots)
    require_booleans(live=live)
    if slots is None:
        require(rows <= len(pool), "pool.shape", pool.shape, f"a slot for each of {rows} rows without slots")


def slot_ids(slots: Int[Array, "B"] | None, live: Bool[Array, "B"] | None, rows: int) -> Int[Array, "B"]:
    """The slot of each row, -1 where it is idle. ``slots`` None: row b has slot b."""
    slots = jnp.arange(rows, dtype=jnp.int32) if slots is None else slots
    return slots if live is None else jnp.where(live, slots, -1)


def live_rows(
    slots: Int[Array, "B"] | None, live: Bool[Array, "B"] | None, rows: int
) -> Bool[Array, "B"] | None:
    """Which rows are not idle; None: all, as is known without looking."""
    return live if slots is None else slot_ids(slots, live, rows) >= 0


def read(
    pool: Shaped[Array, "S ..."],
    slots: Int[Array, "B"] | None,
    live: Bool[Array, "B"] | None,
    rows: int,
) -> Shaped[Array, "B ..."]:
    """What the slots of the rows hold: without ``slots`` a slice, else zeros in idle rows."""
    if slots is None:
        return pool[:rows]
    return pool.at[_past_the_end(pool, slots, live)].get(mode="fill", fill_value=0)


def write(
    pool: Shaped[Array, "S ..."],
    slots: Int[Array, "B"] | None,
    live: Bool[Array, "B"] | None,
    value: Shaped[Array, "B ..."],
) -> Shaped[Array, "S ..."]:
    """``pool`` with the rows' new values; without ``slots`` an idle row's ``value`` must be what it holds."""
    if slots is None:
        return value if len(value) == len(pool) else pool.at[: len(value)].set(value)
    return pool.at[_past_the_end(pool, slots, live)].set(value, mode="drop")


def _past_the_end(pool, slots, live):
    """An idle row's slot: gathers fill it with zeros, scatters drop it."""
    ids = slot_ids(slots, live, len(slots))
    return jnp.where(ids < 0, len(pool), ids)
