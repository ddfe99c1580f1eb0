"""Modules over the shares of their parameters that one device has (see :mod:`parallel.sharding`)."""

from typing import TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from jaxllm.axes import AnyAxis, Concat, described
from jaxllm.linear import Context

Module = TypeVar("Module", bound=nnx.Module)


def at_hand(module: Module, ctx: Context) -> Module:
    """``module`` over what this device computes with; itself where no devices share the step.

    Parameters at rest are gathered here, just before they are used: one residual sub-block at a time is whole.
    """
    place = ctx.placement
    if place is None:
        return module
    graphdef, state = nnx.split(module, nnx.Param)

    def share(variable: nnx.Variable) -> nnx.Variable:
        axes = [described(axis) for axis in variable.get_metadata("axes")]
        return variable.replace(place.share(variable.get_value(), axes))

    return nnx.merge(graphdef, jax.tree.map(share, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def split(axis: Concat, x: Array, ctx: Context) -> tuple[Array, ...]:
    """The segments of ``x`` along its last axis, of which this device may have a share.

    Raises:
        ValueError: ``x`` has another size there.
    """
    if ctx.placement is None:
        return axis.split(x)
    sizes = [sum(ctx.placement.local_sizes(described(part))) for part in axis.parts]
    if x.shape[-1] != sum(sizes):
        raise ValueError(
            f"x: the last axis has size {x.shape[-1]}, but the share of {axis.name} has {sum(sizes)}"
        )
    bounds = [sum(sizes[:i]) for i in range(1, len(sizes))]
    return tuple(jax.numpy.split(x, bounds, axis=-1))


def summed(x: Array, axis: AnyAxis, ctx: Context) -> Array:
    """A product over ``axis``, of which each device may have computed a part."""
    if ctx.placement is None or not ctx.placement.partial(described(axis)):
        return x
    return ctx.placement.sum_tensor(x)
