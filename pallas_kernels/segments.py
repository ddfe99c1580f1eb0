"""Where the documents of packed rows begin and end. Ids count 1..n in row order; 0 is padding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def running_ids(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Ids in which padding continues the document before it, so that they never decrease along a row."""
    return jax.lax.cummax(segment_ids, axis=1)


def continued_ids(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """:func:`running_ids` where padding at a row's begin belongs to its first document, so that states pass over it."""
    return jnp.maximum(running_ids(segment_ids), 1)


def extents(segment_ids: Int[Array, "B T"], n: int) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """First row and number of tokens of each document; an absent one has length 0 (and first row 0)."""
    member = segment_ids[:, :, None] == jnp.arange(1, n + 1, dtype=segment_ids.dtype)
    return jnp.argmax(member, axis=1).astype(jnp.int32), jnp.sum(member, axis=1, dtype=jnp.int32)


def final_windows(
    x: Float[Array, "B T D"],
    initial_state: Float[Array, "B n r D"],
    first: Int[Array, "B n"],
    length: Int[Array, "B n"],
) -> Float[Array, "B n r D"]:
    """The last r rows of (initial state, document) for each document; gathers n r rows."""
    B, n, reach, D = initial_state.shape
    slot = length[:, :, None] + jnp.arange(reach)
    row = jnp.maximum(first[:, :, None] + slot - reach, 0).reshape(B, -1)
    new = jnp.take_along_axis(x, row[..., None], axis=1).reshape(B, n, reach, D).astype(initial_state.dtype)
    old = jnp.take_along_axis(initial_state, jnp.minimum(slot, reach - 1)[..., None], axis=2)
    return jnp.where((slot < reach)[..., None], old, new)
