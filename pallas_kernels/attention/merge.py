"""Attention over two sets of keys, put together from the attention over each."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Part = tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]


def merge(one: Part, other: Part) -> Part:
    """(output, lse) of one softmax over the keys of both parts, each given as ``attention(..., return_lse=True)`` does.

    A query that sees nothing in a part takes the other's; where it sees nothing at all the output is 0, lse -inf.
    """
    (out_a, lse_a), (out_b, lse_b) = one, other
    peak = jnp.maximum(lse_a, lse_b)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    a, b = jnp.exp(lse_a - peak), jnp.exp(lse_b - peak)
    total = a + b
    share = 1 / jnp.where(total > 0, total, 1)
    out = (a * share)[..., None] * out_a + (b * share)[..., None] * out_b
    return out.astype(out_a.dtype), peak + jnp.log(total)
