"""A pipeline over the devices along ``stage``: each has a part of the layers, microbatches go from one to the next.

GPipe's schedule (arXiv 1811.06965): with M microbatches and p stages a pass takes M + p - 1 ticks, and a device works in
M of them. It is one loop that every device runs alike: in its idle ticks it computes on what does not count, as all
stages wait for the slowest anyway. Differentiating the loop gives the backward pass, microbatches in reverse order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
    stage = jax.lax.axis_index(AXIS)
    chain = Chain(AXIS, stage, stage == stages - 1, tuple((at, at + 1) for at in range(stages - 1)))
    return through_chain(lambda h, part, _: layers(h, part), h, parts, stages, chain)


class Chain(NamedTuple):
    """Where this device stands among those that microbatches go through.

    Attributes:
        axis: of the mesh.
        position: devices before it; an array where that is data.
        last: whether it is the last one.
        links: (sender, receiver) along ``axis``.
    """

    axis: str
    position: Any
    last: Any
    links: tuple[tuple[int, int], ...]


def through_chain(
    layers: Callable[[Array, Any, Array], tuple[Array, Any]],
    h: Float[Array, "M *shape"],
    parts: Any,
    length: int,
    chain: Chain,
) -> tuple[Float[Array, "M *shape"], Any]:
    """:func:`through_stages` of devices that are told where they stand.

    Args:
        layers: ``(h, part, works) -> (h, report)``; what it gives where ``works`` is false does not count.
        h: as there.
        parts: as there, the same on all devices of a chain.
        length: of the longest chain that there may be.
        chain: of this device.
    """
    count = len(h)

    def tick(carry: Any, item: Any) -> tuple[Any, Array]:
        (received, total), (now, first) = carry, item
        mine = now - chain.position
        part = jax.tree.map(lambda x: x[jnp.clip(mine, 0, count - 1)], parts)
        works = (mine >= 0) & (mine < count)
        out, report = layers(jnp.where(chain.position == 0, first, received), part, works)
        total = jax.tree.map(lambda sum, x: sum + jnp.where(works, x, 0), total, report)
        return (jax.lax.ppermute(out, chain.axis, chain.links), total), out

    _, report = jax.eval_shape(
        lambda h, part: layers(h, part, jnp.asarray(True)), *jax.tree.map(lambda x: x[0], (h, parts))
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), report)
    # Looped over and not indexed: else every tick's gradient would be one of all microbatches.
    entering = jnp.concatenate([h, jnp.zeros_like(h, shape=(length - 1, *h.shape[1:]))])
    ticks = jnp.arange(len(entering)), entering
    (_, total), outs = jax.lax.scan(tick, (jnp.zeros_like(h[0]), zeros), ticks)
    leaving = jax.lax.dynamic_slice_in_dim(outs, chain.position, count)
    return jnp.where(chain.last, leaving, 0), total


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
