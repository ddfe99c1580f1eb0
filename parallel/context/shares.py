"""All-to-alls: from every element of the own rows to a share of the elements of everyone's, and back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from parallel.context.rows import Axis


def padded(values: Shaped[Array, "..."], dimension: int, multiple: int) -> Shaped[Array, "..."]:
    """Zeros behind, so that ``multiple`` divides the dimension."""
    widths = [(0, 0)] * values.ndim
    widths[dimension] = (0, -values.shape[dimension] % multiple)
    return jnp.pad(values, widths)


def to_shares(values: Shaped[Array, "S N ..."], axis: Axis) -> Shaped[Array, "R ..."]:
    """Share n of the own S rows to worker n; what comes is one share of everyone's rows, R = N * S."""
    return jax.lax.all_to_all(values, axis, split_axis=1, concat_axis=0, tiled=True)[:, 0]


def from_shares(values: Shaped[Array, "N L ..."], axis: Axis) -> Shaped[Array, "L N ..."]:
    """Rows of worker n to worker n; what comes are all shares of the own L rows."""
    moved = jax.lax.all_to_all(values, axis, split_axis=0, concat_axis=1, tiled=True)
    return jnp.moveaxis(moved.reshape(values.shape), 0, 1)
