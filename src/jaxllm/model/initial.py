"""Initial values of convolutions and of what makes decays: A and the bias of the step size (Mamba-2, arXiv 2405.21060)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4


def dt_bias(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
    """softplus^-1 of exp U(log dt_min, log dt_max)."""
    dt = jnp.exp(jax.random.uniform(key, shape, minval=np.log(DT_MIN), maxval=np.log(DT_MAX)))
    dt = jnp.maximum(dt, DT_FLOOR)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)


def a_log(low: float, high: float = 16.0) -> jax.nn.initializers.Initializer:
    """log U(low, high); ``low`` must be positive."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        return jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high)).astype(dtype)

    return init


def centred(bound: float) -> jax.nn.initializers.Initializer:
    """U(-bound, bound): a convolution of k taps takes ``k ** -0.5``."""
    uniform = jax.nn.initializers.uniform(2 * bound)

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        return uniform(key, shape, dtype) - jnp.asarray(bound, dtype)

    return init
