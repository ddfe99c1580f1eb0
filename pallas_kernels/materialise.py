"""A value that XLA:CPU must write to memory once, instead of computing it again in every consumer.

XLA:CPU fuses a chain of elementwise operations into each of its consumers. Where one of them reads it transposed (the
weight gradient of a product does), the whole chain is evaluated again in strided order, which costs several times the
product itself. ``jax.lax.optimization_barrier`` does not help: the CPU pipeline drops it before fusion. A conditional
is not fused across.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.target import target


def hold(x: Array) -> Array:
    """``x`` held in memory on CPU, for integers and inside hand-written gradients: its own cotangent is not held."""
    if target().platform != "cpu" or x.size == 0:
        return x
    bits = jax.lax.bitcast_convert_type(x.ravel()[0], jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
    # Always true, NaN or not, but not to the compiler.
    return jax.lax.cond((bits | 1) != 0, lambda v: v, lambda v: -v, x)


@jax.custom_vjp
def materialise(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x`` itself, held in memory on CPU, and its cotangent likewise; nothing at all on other devices."""
    return hold(x)


materialise.defvjp(lambda x: (hold(x), None), lambda _, g: (hold(g),))
