"""bfloat16 in pools as its bits.

XLA:CPU scatters and gathers integers in place, but would convert a whole pool of bfloat16 to float32 and back.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def stored_dtype(dtype: Any) -> Any:
    """How a pool keeps ``dtype``."""
    return jnp.dtype(jnp.uint16) if jnp.dtype(dtype) == jnp.bfloat16 else jnp.dtype(dtype)


def store(value: Array, dtype: Any) -> Array:
    """``value`` as a pool of ``dtype`` keeps it."""
    if dtype != jnp.uint16:
        return value.astype(dtype)
    return jax.lax.bitcast_convert_type(value.astype(jnp.bfloat16), jnp.uint16)


def load(stored: Array) -> Array:
    """The floats of what a pool keeps."""
    return stored if stored.dtype != jnp.uint16 else jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
