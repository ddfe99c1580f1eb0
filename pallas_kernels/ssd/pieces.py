"""Packed rows as pieces, the stretches of one document in one chunk, between which the states are kept.

Where a state is kept for each document, a piece is a document's tokens in a chunk. Otherwise there is one piece a chunk:
its state is that of the chunk's last document, and the ids of the tokens say who sees and who changes it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.segments import continued_ids, running_ids

# Columns of a table of pieces, in the order in which states pass through them.
PIECE, CHUNK, SEES, ADDS, LAST, OPENS, CLOSES = range(7)


class Pieces(NamedTuple):
    """Where states are kept.

    Attributes:
        ids: document of each token, never decreasing along a row; padding has that of a neighbour.
        table: per piece its number, its chunk, the ids of the tokens that see the state before it (``SEES``) and that
            add to the state (``ADDS``), its last token if the state before it lives on (else -1), and the documents
            whose initial state it begins with and whose final state it ends with (else -1).
        spans: first piece of each chunk, and how many it has.
        counts: pieces of each row.
        occurs: documents that the row holds, whose states pass through its pieces.
    """

    ids: Int[Array, "B L"]
    table: Int[Array, "B p 7"]
    spans: Int[Array, "B nc 2"]
    counts: Int[Array, "B"]
    occurs: Bool[Array, "B n"]

    def backwards(self) -> Int[Array, "B p 7"]:
        """The table for cotangents of states, which pass from the last piece to the first."""
        number = self.counts[:, None] - 1 - jnp.arange(self.table.shape[1])
        turned = jnp.take_along_axis(self.table, jnp.maximum(number, 0)[:, :, None], axis=1)
        return turned[:, :, jnp.array([PIECE, CHUNK, ADDS, SEES, LAST, CLOSES, OPENS])]


def one_per_chunk(ids: Int[Array, "B L"], Q: int, final: bool) -> Pieces:
    """Pieces of rows with one state, from document to document; document 0 is the one that rows begin and end with.

    Args:
        ids: document of each token, L a multiple of Q.
        Q: tokens of a chunk.
        final: the state at the end of the row is wanted.
    """
    rows, L = ids.shape
    nc = L // Q
    chunk = jnp.broadcast_to(jnp.arange(nc, dtype=jnp.int32), (rows, nc))
    adds = ids[:, Q - 1 :: Q]
    sees = jnp.concatenate([ids[:, :1], adds[:, :-1]], axis=1)
    last = jnp.where(adds == sees, chunk * Q + Q - 1, -1)
    opens = jnp.where(chunk == 0, 0, -1)
    closes = jnp.where((chunk == nc - 1) & final, 0, -1)
    table = jnp.stack([chunk, chunk, sees, adds, last, opens, closes], axis=2)
    spans = jnp.stack([chunk, jnp.ones_like(chunk)], axis=2)
    counts = jnp.full(rows, nc, jnp.int32)
    return Pieces(ids, table.astype(jnp.int32), spans, counts, jnp.ones((rows, 1), bool))


def one_per_document(ids: Int[Array, "B L"], Q: int, n: int) -> Pieces:
    """Pieces of rows with a state for each document 1..n; arguments as of :func:`one_per_chunk`."""
    rows, L = ids.shape
    nc = L // Q
    most = nc + n
    changes = ids[:, 1:] != ids[:, :-1]
    edge = jnp.ones((rows, 1), bool)
    first, final = jnp.concatenate([edge, changes], axis=1), jnp.concatenate([changes, edge], axis=1)
    starts = first | (jnp.arange(L) % Q == 0)
    number = jnp.cumsum(starts, axis=1, dtype=jnp.int32) - 1
    counts = number[:, -1] + 1
    start = jnp.full((rows, most), L, jnp.int32)
    at = jnp.where(starts, number, most)
    start = start.at[jnp.arange(rows)[:, None], at].set(jnp.arange(L, dtype=jnp.int32), mode="drop")
    last = jnp.concatenate([start[:, 1:], jnp.full((rows, 1), L, jnp.int32)], axis=1) - 1

    def of(v, token):
        return jnp.take_along_axis(v, jnp.minimum(token, L - 1), axis=1)

    id = of(ids, start)
    opens = jnp.where(of(first, start) & (id > 0), id - 1, -1)
    closes = jnp.where(of(final, last) & (id > 0), id - 1, -1)
    piece = jnp.broadcast_to(jnp.arange(most, dtype=jnp.int32), (rows, most))
    table = jnp.stack([piece, jnp.minimum(start // Q, nc - 1), id, id, last, opens, closes], axis=2)
    head = number[:, ::Q]
    spans = jnp.stack([head, jnp.append(head[:, 1:], counts[:, None], axis=1) - head], axis=2)
    occurs = jnp.any(ids[:, :, None] == jnp.arange(1, n + 1), axis=1)
    return Pieces(ids, table.astype(jnp.int32), spans, counts, occurs)


def pieces_of(
    segment_ids: Int[Array, "B T"] | None, batch: int, T: int, L: int, Q: int, n: int | None, open_ends: bool
) -> Pieces:
    """The pieces of a call of an op with ``num_segments`` n, its T tokens filled up to L, a multiple of chunks of Q."""
    fill = ((0, 0), (0, L - T))
    if n is not None and n > 1:
        assert segment_ids is not None
        return one_per_document(jnp.pad(running_ids(segment_ids), fill, mode="edge"), Q, n)
    # With one document a row, padding (no decay, nothing written) leaves the state alone.
    ids = jnp.ones((batch, T), jnp.int32)
    if segment_ids is not None and (n is None or open_ends):
        ids = continued_ids(segment_ids) if open_ends else running_ids(segment_ids)
    return one_per_chunk(jnp.pad(ids.astype(jnp.int32), fill, mode="edge"), Q, n is not None)


def filled(v: Shaped[Array, "B T ..."], L: int, dtype: DTypeLike) -> Shaped[Array, "B L ..."]:
    """``v`` in this dtype with zeros up to L tokens."""
    fill = [(0, 0)] * v.ndim
    fill[1] = (0, L - v.shape[1])
    return jnp.pad(v.astype(dtype), fill)


def _sum_of_mates(v: Float[Array, "B H L"], ids: Int[Array, "B L"], Q: int, later: bool, own: bool):
    """Sums over the tokens of a token's own chunk and document, earlier or later ones, its own with them or not."""
    rows, H, L = v.shape
    v, ids = v.reshape(rows, H, -1, Q), ids.reshape(rows, 1, -1, Q)
    before = jnp.tril(jnp.ones((Q, Q), bool), 0 if own else -1)
    mates = (before.T if later else before) & (ids[..., :, None] == ids[..., None, :])
    return jnp.sum(jnp.where(mates, v[..., None, :], 0), axis=-1).reshape(rows, H, L)


def log_decays(
    a: Float[Array, "B H L"], ids: Int[Array, "B L"], Q: int
) -> tuple[Float[Array, "B H L"], Float[Array, "B H L"]]:
    """Sums of log decays over the tokens of a token's own chunk and document: up to it, itself included, and after it.

    Sums of their own instead of differences: a document's decays are not what is left of its neighbour's.
    """
    return _sum_of_mates(a, ids, Q, False, True), _sum_of_mates(a, ids, Q, True, False)


def log_decay_gradients(
    up_to: Float[Array, "B H L"], after: Float[Array, "B H L"], ids: Int[Array, "B L"], Q: int
) -> Float[Array, "B H L"]:
    """The gradient of ``a`` from those of the two sums of :func:`log_decays`."""
    return _sum_of_mates(up_to, ids, Q, True, True) + _sum_of_mates(after, ids, Q, False, False)
