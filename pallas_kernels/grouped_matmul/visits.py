"""Which tiles of rows meet which experts: the table that the Hopper kernels follow."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# Columns of the table.
TILE, EXPERT, FIRST, END = range(4)


def most_visits(rows: int, experts: int, block: int) -> int:
    """Every visit has a row, and but for the first each begins a tile or an expert (rows of no expert are one more)."""
    return min(rows, -(-rows // block) + experts)


def visits(sizes: Int[Array, " E"], rows: int, block: int) -> Int[Array, "V 4"]:
    """Tile of ``block`` rows, expert, and the rows [first, end) of it in the tile, in the order of the rows.

    The rows past the last expert's are those of expert E. Places of the table that are left over have no rows.
    """
    E = sizes.shape[0]
    sizes = jnp.append(sizes, rows - jnp.sum(sizes)).astype(jnp.int32)
    end = jnp.cumsum(sizes)
    first = end - sizes
    began = first // block
    tiles = jnp.where(sizes > 0, (end - 1) // block - began + 1, 0)
    upto = jnp.cumsum(tiles)
    index = jnp.arange(most_visits(rows, E, block), dtype=jnp.int32)
    expert = jnp.sum(index[:, None] >= upto[None], axis=1, dtype=jnp.int32)
    own = jnp.minimum(expert, E)
    tile = began[own] + index - (upto - tiles)[own]
    start = jnp.maximum(first[own], tile * block)
    stop = jnp.minimum(end[own], (tile + 1) * block)
    used = expert <= E
    found = jnp.stack([tile, own, start, jnp.where(used, stop, start)], axis=1)
    return jax.lax.stop_gradient(jnp.where(used[:, None], found, 0))
