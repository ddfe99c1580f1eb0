"""A pipeline over the devices along ``stage``: each has a part of the layers, microbatches go from one to the next.

GPipe's schedule (arXiv 1811.06965): with M microbatches and p stages a pass takes M + p - 1 ticks, and a device works in
M of them. It is one loop that every device runs alike: in its idle ticks it computes on what does not count, as all
stages wait for the slowest anyway. Differentiating the loop gives the backward pass, microbatches in reverse order.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AXIS = "stage"


def through_stages(
    layers: Callable[[Array, Any], tuple[Array, Any]], h: Float[Array, "M *shape"], parts: Any, stages: int
) -> tuple[Float[Array, "M *shape"], Any]:
    """What the last stage makes of every microbatch; call it under ``shard_map``.

    Args:
        layers: this device's part of the layers: ``(h, part) -> (h, report)``; ``report`` is a tree of numbers.
        h: the first stage's input, a microbatch each; other stages' does not count.
        parts: what the layers read beside it, the same on all stages: leaves [M, ...].
        stages: devices along ``stage``.

    Returns:
        the last stage's output (zeros on other devices), and the sum of this device's reports over the microbatches.
    """
    count, stage = len(h), jax.lax.axis_index(AXIS)
    forward = [(at, at + 1) for at in range(stages - 1)]

    def tick(carry: Any, item: Any) -> tuple[Any, Array]:
        (received, total), (now, first) = carry, item
        mine = now - stage
        part = jax.tree.map(lambda x: x[jnp.clip(mine, 0, count - 1)], parts)
        out, report = layers(jnp.where(stage == 0, first, received), part)
        works = (mine >= 0) & (mine < count)
        total = jax.tree.map(lambda sum, x: sum + jnp.where(works, x, 0), total, report)
        return (jax.lax.ppermute(out, AXIS, forward), total), out

    _, report = jax.eval_shape(layers, *jax.tree.map(lambda x: x[0], (h, parts)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), report)
    # Looped over and not indexed: else every tick's gradient would be one of all microbatches.
    entering = jnp.concatenate([h, jnp.zeros_like(h, shape=(stages - 1, *h.shape[1:]))])
    ticks = jnp.arange(len(entering)), entering
    (_, total), outs = jax.lax.scan(tick, (jnp.zeros_like(h[0]), zeros), ticks)
    return jnp.where(stage == stages - 1, outs[stages - 1 :], 0), total


def own_tokens(x: Array, stages: int, fill: Any = 0) -> Array:
    """[B, T, ...] to this stage's [B, T / stages, ...] of an array that all stages have; ``fill`` where T ends early."""
    size = -(-x.shape[1] // stages)
    x = _padded(x, size * stages, fill)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size, axis=1)


def deal_tokens(h: Float[Array, "B T D"], stages: int) -> Float[Array, "B t D"]:
    """The last stage's output dealt out, so that every stage scores its share of the tokens; others gave zeros."""
    size = -(-h.shape[1] // stages)
    return jax.lax.psum_scatter(_padded(h, size * stages, 0), AXIS, scatter_dimension=1, tiled=True)


def _padded(x: Array, length: int, fill: Any) -> Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
