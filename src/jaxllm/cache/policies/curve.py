"""How many of the best tokens hold a share of the softmax: exact first ranks, then a fitted curve a / x + b."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


def harmonic(most: int) -> Float[np.ndarray, " entries"]:
    """f32: sums of 1 / x over x = 1 .. i, for i = 0 .. ``most``."""
    sums = np.cumsum(1 / np.arange(1, most + 1, dtype=np.float64))
    return np.concatenate([[0.0], sums]).astype(np.float32)


class Curve(NamedTuple):
    """y(x) = max(a / x + b, 0) over ranks x from 1.

    Attributes:
        a: f32[...].
        b: f32[...].
    """

    a: Any
    b: Any


def fit(
    y: tuple[Float[Array, "..."], Float[Array, "..."]],
    inverse: tuple[Float[Array, "..."], Float[Array, "..."]],
) -> Curve:
    """The curve through two windows' mean values ``y``, where ``inverse`` are their means of 1 / x.

    With the means of 1 / x (not one over the middle rank) values that lie on a curve give exactly that one, however
    wide the windows. Where both windows are the same, the curve is flat.
    """
    apart = inverse[0] - inverse[1]
    a = jnp.where(apart > 0, (y[0] - y[1]) / jnp.where(apart > 0, apart, 1), 0)
    return Curve(a, y[0] - a * inverse[0])


def ranks_for(
    mass: float,
    head: Float[Array, "..."],
    curve: Curve,
    m: Int[Array, "..."],
    n: Int[Array, "..."],
    sums: Float[Array, " entries"],
) -> Int[Array, "..."]:
    """The least number of ranks, from ``m`` to ``n``, that holds ``mass`` of the estimated total.

    Args:
        mass: in (0, 1].
        head: exact sum of y over ranks 1 .. m.
        curve: estimate beyond.
        m: ranks known exactly.
        n: ranks there are; m <= n <= N.
        sums: :func:`harmonic` of N.
    """
    a, b = curve
    # Where the line crosses zero: it is clamped beyond (b < 0), or before where the fit rises with the rank (a < 0).
    # A line without b comes down to zero nowhere.
    zero = jnp.where(b == 0, jnp.inf, jnp.floor(-a / jnp.where(b == 0, 1, b)))
    zero = jnp.clip(zero, m, n).astype(jnp.int32)
    low, high = jnp.where(a < 0, zero, m), jnp.where(b < 0, zero, n)

    def upto(x: Array) -> Array:
        last = jnp.clip(x, low, jnp.maximum(low, high))
        return head + a * (sums[last] - sums[low]) + b * (last - low)

    target = mass * upto(n)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        least, most = bounds
        middle = (least + most) // 2
        enough = upto(middle) >= target
        return jnp.where(enough, least, middle + 1), jnp.where(enough, middle, most)

    return lax.fori_loop(0, len(sums).bit_length(), halve, (m, n))[1]
