"""Where the documents of packed rows begin and end. Ids count 1..n in row order; 0 is padding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def running_ids(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Ids in which padding continues the document before it, so that they never decrease along a row."""
    return jax.lax.cummax(segment_ids, axis=1)


def extents(segment_ids: Int[Array, "B T"], n: int) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """First row and number of tokens of each document; an absent one has length 0 (and first row 0)."""
    member = segment_ids[:, :, None] == jnp.arange(1, n + 1, dtype=segment_ids.dtype)
    return jnp.argmax(member, axis=1).astype(jnp.int32), jnp.sum(member, axis=1, dtype=jnp.int32)
