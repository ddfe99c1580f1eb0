"""What the mixers of the delta rule share: unit keys, log decays, decode, the norm of heads."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.axes import AnyAxis
from jaxllm.model.layers import normalised, parameter
from pallas_kernels.gated_delta.step import gated_delta_step

UNIT_EPS = 1e-6


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """``x`` at Euclidean length 1, float32; the epsilon is inside the root and added to the sum, not to the mean."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + UNIT_EPS)


def scan_inputs(
    q: Float[Array, "B T H dk"],
    k: Float[Array, "B T H dk"],
    v: Float[Array, "B T Hv dv"],
    decay: Float[Array, "B T Hv"],
    beta: Float[Array, "B T Hv"],
    A_log: Float[Array, "Hv"],
    dt_bias: Float[Array, "Hv"],
) -> tuple[Array, Array, Array, Array, Array]:
    """q, k, v, g, beta as the rule takes them: unit keys, unit queries over sqrt(dk), and float32 log decays.

    ``g = -exp(A_log) softplus(decay + dt_bias)`` is at most 0.
    """
    step = jax.nn.softplus(decay.astype(jnp.float32) + dt_bias.astype(jnp.float32))
    g = -jnp.exp(A_log.astype(jnp.float32)) * step
    return unit(q) * q.shape[-1] ** -0.5, unit(k), v, g, beta.astype(jnp.float32)


def scan_step(q: Array, k: Array, v: Array, g: Array, beta: Array, **options: Any) -> tuple[Array, Array]:
    """:func:`gated_delta_step` as ``Ops.scan_step``."""
    o, pool = gated_delta_step(*(x[:, 0] for x in (q, k, v, g, beta)), **options)
    return o[:, None], pool


class HeadNorm(nnx.Module):
    """RMSNorm over each head with one weight for all, THEN the gate: the other order than Mamba-2's.

    ``cast`` as in :class:`jaxllm.model.layers.RMSNorm`: "first" rounds before the weight (Qwen3-Next), "last" after the
    gate (Jet-Nemotron).
    """

    def __init__(self, axis: AnyAxis, *, eps: float, cast: str, dtype: str, rngs: nnx.Rngs):
        self.weight = parameter((axis,), jax.nn.initializers.ones, rngs, dtype)
        self.eps = eps
        self.cast = cast

    def __call__(self, o: Float[Array, "B T H d"], z: Float[Array, "B T H d"]) -> Float[Array, "B T H d"]:
        u = normalised(o, self.eps)
        if self.cast == "first":
            u = (u.astype(z.dtype) * self.weight[...].astype(z.dtype)).astype(jnp.float32)
        else:
            u = u * self.weight[...].astype(jnp.float32)
        return (u * jax.nn.silu(z.astype(jnp.float32))).astype(z.dtype)
