"""Repeated groups of sub-blocks under ``lax.scan``: traced and compiled once, whatever the depth (contract 8).

A deep pattern repeats itself: ``M-M-M-*-`` twelve times. :func:`groups_of` cuts it into motifs and their repeats; the
parameters of a repeated motif are stacked, [repeats, ...] each, and the state of training holds them so.
:func:`stack` and :func:`unstack` move between that and one entry per layer, which everything else sees.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.axes import Axis
from jaxllm.batch import PackedBatch
from jaxllm.linear import Context

Aux = dict[str, Any]


class Span(NamedTuple):
    """Layers ``start`` to ``start + repeats * length`` of a pattern: a motif of ``length`` letters, repeated."""

    start: int
    length: int
    repeats: int


@lru_cache(maxsize=64)
def groups_of(pattern: str) -> tuple[Span, ...]:
    """The cut of ``pattern`` with the least to compile: letters that are traced and groups, one like the other.

    A loop is a program of its own. ``MMMM-MMMM-`` is therefore its five letters twice, not four loops over four letters.
    """
    best: dict[int, tuple[int, int, tuple[Span, ...]]] = {len(pattern): (0, 0, ())}
    for start in range(len(pattern) - 1, -1, -1):
        options = []
        for length in range(1, len(pattern) - start + 1):
            motif, repeats = pattern[start : start + length], 0
            while pattern.startswith(motif, start + repeats * length):
                repeats += 1
                traced, groups, rest = best[start + repeats * length]
                options.append((traced + length, groups + 1, (Span(start, length, repeats), *rest)))
        best[start] = min(options, key=lambda option: (option[0] + option[1], option[0]))
    return best[0][2]


class Group(nnx.Module):
    """``repeats`` times the same letters; every parameter has a leading axis of that size."""

    def __init__(self, span: Span, build: Callable[[nnx.Rngs, int], nnx.Module], *, rngs: nnx.Rngs):
        """Build makes the sub-block of one letter, by its place in the motif."""
        self.repeats = span.repeats

        @nnx.split_rngs(splits=span.repeats)
        @nnx.vmap(in_axes=(0, None), out_axes=0)
        def stacked(rngs: nnx.Rngs, place: int) -> nnx.Module:
            return build(rngs, place)

        self.blocks = nnx.List([stacked(rngs, place) for place in range(span.length)])
        layers = Axis("layers", span.repeats)
        for _, variable in nnx.to_flat_state(nnx.state(self.blocks, nnx.Param)):
            variable.set_metadata("axes", (layers, *variable.get_metadata("axes")))

    def __call__(
        self, h: Float[Array, "B T D"], batch: PackedBatch, ctx: Context, call: Callable[..., Any]
    ) -> tuple[Float[Array, "B T D"], list[tuple[Array | None, Aux]]]:
        """The last residual state, and for every layer in order the state after it and what it reports.

        Args:
            h: residual state.
            batch: as everywhere.
            ctx: as everywhere; the states after each layer are kept for the tap "hidden" only.
            call: ``(block, ctx) -> (h, batch) -> (h, aux)``, which rematerialises as ``ctx.remat`` says.
        """
        graphdef, params = nnx.split(self.blocks)

        def repeat(h: Array, params: Any) -> tuple[Array, Any]:
            seen = []
            for block in nnx.merge(graphdef, params):
                h, aux = call(block, ctx)(h, batch)
                seen.append((h if "hidden" in ctx.taps else None, aux))
            return h, seen

        # Of the repeats a device may have a share.
        repeats = len(jax.tree.leaves(params)[0])
        h, seen = jax.lax.scan(repeat, h, params)
        return h, [jax.tree.map(itemgetter(r), each) for r in range(repeats) for each in seen]


def layer_names(name: str, groups: Sequence[Span]) -> tuple[str, ...]:
    """In the order of the stack: names of the layers whose parameters are stacked under ``groups.1.blocks.0.norm.weight``."""
    _, group, _, place, rest = name.split(".", 4)
    span = groups[int(group)]
    return tuple(f"layers.{span.start + r * span.length + int(place)}.{rest}" for r in range(span.repeats))


def unstacked(params: dict[str, Any], pattern: str) -> dict[str, Any]:
    """Leaves by dotted path, one entry per layer, from those of a model with stacked groups."""
    groups, out = groups_of(pattern), {}
    for name, leaf in params.items():
        if name.startswith("groups."):
            out |= {layer: leaf[r] for r, layer in enumerate(layer_names(name, groups))}
        else:
            out[name] = leaf
    return out


def stacked(params: dict[str, Any], names: Sequence[str], pattern: str) -> dict[str, Any]:
    """Inverse of :func:`unstacked`; ``names`` are those of the model with stacked groups."""
    groups = groups_of(pattern)
    return {
        name: jnp.stack([params[layer] for layer in layer_names(name, groups)])
        if name.startswith("groups.")
        else params[name]
        for name in names
    }
