"""One thing after another, where nothing else would say so."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool


def there(*done: jax.Array) -> Bool[Array, ""]:
    """True, which the compiler does not know and the program not before all of ``done`` is there.

    A barrier would be a hint, which some compilers drop before they schedule; this is a dependence. XLA:CPU needs it
    between a loop with collectives in it and a collective beside that: it runs them at once, each blocks a thread, and
    simulated devices that meet them in different orders wait for each other for ever.

    Args:
        done: arrays of any shape and dtype.
    """
    sure = jnp.bool_(True)
    for x in done:
        bits = lax.bitcast_convert_type(x[(0,) * x.ndim].astype(jnp.float32), jnp.uint32)
        # NaN or not.
        sure &= (bits | 1) != 0
    return sure
