"""Linear, embedding and norms: the small modules that every mixer is made of."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.axes import AnyAxis, Axes, Axis, shape
from jaxllm.linear import Context, linear
from jaxllm.model.shares import summed


def parameter(axes: Axes, init: jax.nn.initializers.Initializer, rngs: nnx.Rngs, dtype: str) -> nnx.Param:
    """A parameter that knows its axes: ``param.axes``."""
    return nnx.Param(init(rngs.params(), shape(axes), jnp.dtype(dtype)), axes=axes)


class Linear(nnx.Module):
    """``x @ weight + bias`` with weight [in, out] (contract 6)."""

    def __init__(
        self, inputs: AnyAxis, outputs: AnyAxis, *, bias: bool, std: float, dtype: str, rngs: nnx.Rngs
    ):
        self.weight = parameter((inputs, outputs), jax.nn.initializers.normal(std), rngs, dtype)
        self.bias = parameter((outputs,), jax.nn.initializers.zeros, rngs, dtype) if bias else None

    def __call__(self, x: Float[Array, "B T i"], ctx: Context) -> Float[Array, "B T o"]:
        y = summed(linear(x, self.weight.get_value(), ctx), self.weight.get_metadata("axes")[-2], ctx)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """Token table [V, D]."""

    def __init__(self, vocab: Axis, embed: Axis, *, std: float, dtype: str, rngs: nnx.Rngs):
        self.weight = parameter((vocab, embed), jax.nn.initializers.normal(std), rngs, dtype)

    def __call__(self, tokens: Int[Array, "B T"], ctx: Context) -> Float[Array, "B T D"]:
        table = self.weight[...]
        if ctx.placement is None or ctx.placement.size("tensor") == 1:
            return table[tokens].astype(ctx.precision.compute)
        # This device has some of the entries; the others give zeros, so that the sum is exact.
        place = tokens - jax.lax.axis_index("tensor") * len(table)
        own = (place >= 0) & (place < len(table))
        found = jnp.where(own[..., None], table[jnp.where(own, place, 0)], 0)
        return ctx.placement.sum_tensor(found).astype(ctx.precision.compute)


def normalised(x: jax.Array, eps: float) -> jax.Array:
    """``x`` at a mean square of 1 over the last axis, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis; ``cast`` "last" multiplies the weight in float32, "first" after the cast."""

    def __init__(self, axis: AnyAxis, *, eps: float, cast: str, dtype: str, rngs: nnx.Rngs):
        self.weight = parameter((axis,), jax.nn.initializers.ones, rngs, dtype)
        self.eps = eps
        self.cast = cast

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = normalised(x, self.eps)
        if self.cast == "first":
            return y.astype(x.dtype) * self.weight[...].astype(x.dtype)
        return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """Gate first, then RMSNorm over each of ``groups`` contiguous groups, cast, then the weight (Mamba-2)."""

    def __init__(self, axis: AnyAxis, *, groups: int, eps: float, dtype: str, rngs: nnx.Rngs):
        self.weight = parameter((axis,), jax.nn.initializers.ones, rngs, dtype)
        self.groups = groups
        self.eps = eps

    def __call__(
        self, y: Float[Array, "B T D"], z: Float[Array, "B T D"], ctx: Context
    ) -> Float[Array, "B T D"]:
        u = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
        shares = 1 if ctx.placement is None else ctx.placement.size("tensor")
        if self.groups % shares == 0:
            u = normalised(u.reshape(*u.shape[:-1], self.groups // shares, -1), self.eps).reshape(u.shape)
        else:
            u = u * self._inverse_root(u, shares, ctx)
        return u.astype(z.dtype) * self.weight[...].astype(z.dtype)

    def _inverse_root(self, u: Array, shares: int, ctx: Context) -> Array:
        """[..., 1]; of the mean square of the group that this device's share of the channels is a part of."""
        assert ctx.placement is not None
        each = shares // self.groups
        mine = jax.nn.one_hot(jax.lax.axis_index("tensor") // each, self.groups)
        totals = ctx.placement.sum_tensor(jnp.sum(jnp.square(u), axis=-1, keepdims=True) * mine)
        total = jnp.sum(totals * mine, axis=-1, keepdims=True)
        return jax.lax.rsqrt(total / (u.shape[-1] * each) + self.eps)
