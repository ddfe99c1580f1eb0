"""Moves the documents of packed rows to chunk boundaries, for chunked recurrences that keep a state per document."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from pallas_kernels.segments import extents


class Aligned(NamedTuple):
    """Documents that begin and end on chunk boundaries, so that the states pass through any number of them."""

    document: Int[Array, "B nc"]
    opens: Bool[Array, "B nc"]
    closes: Bool[Array, "B nc"]


@jax.custom_vjp
def move(
    v: Shaped[Array, "B T ..."], source: Int[Array, "B R"], target: Int[Array, "B T"]
) -> Shaped[Array, "B R ..."]:
    """Row ``source[b, r]`` of v at row r, zeros where source is -1; ``target`` is the inverse map, likewise.

    Both directions gather: the transpose of a gather would be a scatter, which is slow on every device.
    """
    rows = jnp.take_along_axis(v, jnp.maximum(source, 0).reshape(*source.shape, *[1] * (v.ndim - 2)), axis=1)
    return jnp.where((source >= 0).reshape(*source.shape, *[1] * (v.ndim - 2)), rows, 0)


def _move_fwd(v, source, target):
    return move(v, source, target), (source, target)


def _move_bwd(maps, g):
    source, target = maps
    return move(g, target, source), None, None


move.defvjp(_move_fwd, _move_bwd)


def align(
    segment_ids: Int[Array, "B T"], n: int, Q: int
) -> tuple[Int[Array, "B R"], Int[Array, "B T"], Aligned]:
    """Where each token goes when every document starts on a boundary of chunks of Q; at most n extra chunks.

    Args:
        segment_ids: documents 1..n in row order, 0 = padding, which is left out.
        n: most documents of a row.
        Q: tokens of a chunk.

    Returns:
        The token that each of R = nc * Q places takes (-1: none), the place of each token (-1: none), and which
        document each chunk belongs to. Both maps are arguments of :func:`move`.
    """
    T = segment_ids.shape[1]
    nc = (T + n * (Q - 1)) // Q
    first, length = extents(segment_ids, n)
    ends = jnp.cumsum(-(-length // Q), axis=1)
    opening = ends - (-(-length // Q))
    index = jnp.maximum(segment_ids - 1, 0)

    def of_document(v, document):
        return jnp.take_along_axis(v, document, axis=1)

    target = jnp.arange(T) - of_document(first, index) + Q * of_document(opening, index)
    target = jnp.where(segment_ids > 0, target, -1)
    chunk = jnp.arange(nc)
    # Chunks past the last document's end belong to it too, as padding.
    document = jnp.minimum(jnp.sum(ends[:, None, :] <= chunk[:, None], axis=2), n - 1)
    offset = jnp.arange(nc * Q) - Q * jnp.repeat(of_document(opening, document), Q, axis=1)
    inside = offset < jnp.repeat(of_document(length, document), Q, axis=1)
    source = jnp.where(inside, offset + jnp.repeat(of_document(first, document), Q, axis=1), -1)
    occurs = of_document(length, document) > 0
    opens = occurs & (chunk == of_document(opening, document))
    closes = occurs & (chunk == of_document(ends, document) - 1)
    return source, target, Aligned(document, opens, closes)
