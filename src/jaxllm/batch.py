"""Contract 1: the one batch type that every layer, trainer and engine passes around."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tree

# Leaves are arrays, but also ShapeDtypeStructs, shardings or tracers while JAX maps over the tree.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedBatch:
    """Rows of packed documents; causality is (segment, position), never the row index.

    Shapes use B rows, T tokens, n segments per row, Q prediction depths, W window. Optional fields are None when the
    step does not use them, so their absence is static.

    Attributes:
        tokens: i32[B, T].
        segment_ids: i32[B, T]; documents numbered 1, 2, ... in row order; 0 is padding, inert in every layer.
        positions: i32[B, T]; position of each token in its document.
        slots: i32[B, n]; the cache slot that each segment reads and writes; -1 is none. None means that row r holds
            one segment, in slot r: the cache is then read as a slice, not gathered.
        targets: i32[B, T, Q]; the token Q steps ahead, -1 where there is none.
        loss_mask: f32[B, T]; weight of each position's loss.
        parents: i32[B, W]; in a window, each node's parent among its row's nodes, -1: the committed tokens. None: a
            chain.
    """

    tokens: Leaf
    segment_ids: Leaf
    positions: Leaf
    slots: Leaf = None
    targets: Leaf = None
    loss_mask: Leaf = None
    parents: Leaf = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.tokens.shape

    def replace(self, **changes: Leaf) -> "PackedBatch":
        """A copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def from_rows(
        cls,
        tokens: Leaf,
        *,
        lengths: Leaf = None,
        offset: Leaf = 0,
        slots: Leaf = None,
        parents: Leaf = None,
    ) -> "PackedBatch":
        """One document per row, right padded.

        Args:
            tokens: i32[B, T].
            lengths: i32[B]; valid tokens of each row; None: all.
            offset: i32[B] or int; position of each row's first token.
            slots: i32[B, 1] or None, as in the class.
            parents: i32[B, T] or None: the rows are trees, and a node's position is ``offset`` and its depth.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        rows, length = tokens.shape
        index = jnp.arange(length, dtype=jnp.int32)[None]
        offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32).reshape(-1, 1), (rows, 1))
        valid = jnp.ones((rows, length), bool) if lengths is None else index < jnp.asarray(lengths)[:, None]
        if parents is not None:
            parents = jnp.asarray(parents, jnp.int32)
            index = jnp.maximum(tree.depths(tree.ancestors(parents, valid)), 0)
        return cls(
            tokens=tokens,
            segment_ids=valid.astype(jnp.int32),
            positions=index + offset,
            slots=slots,
            parents=parents,
        )
