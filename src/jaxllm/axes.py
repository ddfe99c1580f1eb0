"""Contract 5: one vocabulary for parameter axes.

Every axis of a parameter is a named axis, a product of axes (heads x head dim) or a concatenation of named segments
(the fused Mamba projection is z | x | B | C | dt). Fused weights stay fused; whoever splits, shards, prunes,
quantises or converts one asks its axes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Axis:
    """A plain named axis."""

    name: str
    size: int


@dataclass(frozen=True)
class Product:
    """Axes flattened into one, the first outermost: q_heads = kv_heads x group x head_dim."""

    name: str
    parts: tuple["AnyAxis", ...]

    @property
    def size(self) -> int:
        return math.prod(part.size for part in self.parts)


@dataclass(frozen=True)
class Concat:
    """Named segments one after the other."""

    name: str
    parts: tuple["AnyAxis", ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def slices(self) -> Iterator[tuple[str, slice]]:
        """(segment name, slice) in storage order."""
        start = 0
        for part in self.parts:
            yield part.name, slice(start, start + part.size)
            start += part.size

    def split(self, x: jax.Array, axis: int = -1) -> tuple[jax.Array, ...]:
        """The segments of ``x`` along ``axis``, in storage order.

        Raises:
            ValueError: ``x`` has another size along ``axis``.
        """
        if x.shape[axis] != self.size:
            raise ValueError(f"x: axis {axis} has size {x.shape[axis]}, but {self.name} has {self.size}")
        bounds = [s.stop for _, s in self.slices()][:-1]
        return tuple(jnp.split(x, bounds, axis=axis))


AnyAxis = Axis | Product | Concat
Axes = tuple[AnyAxis, ...]


def described(axis: AnyAxis) -> tuple[tuple[tuple[str, int], ...], ...]:
    """``axis`` as plain tuples, for floors below: segments one after the other, each a product of (name, size)."""
    if isinstance(axis, Axis):
        return (((axis.name, axis.size),),)
    if isinstance(axis, Concat):
        return tuple(segment for part in axis.parts for segment in described(part))
    factors: list[tuple[str, int]] = []
    for part in axis.parts:
        (segment,) = described(part)
        factors += segment
    return (tuple(factors),)


def shape(axes: Axes) -> tuple[int, ...]:
    """The array shape that ``axes`` describe."""
    return tuple(axis.size for axis in axes)
