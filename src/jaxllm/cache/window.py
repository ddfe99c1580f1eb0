"""Windows: tokens read on from a slot that leave it as it is until one of their paths is committed (contract 2).

Speculation verifies a chain or a tree of proposed tokens at once. A window's row is one segment; its nodes hang on each
other as ``batch.parents`` says and on the tokens that the slot holds, and a node's position is the number of those and
its depth. A layer's window state holds its pools untouched beside what the window adds, factors where W states would
be large.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxllm.batch import Leaf, PackedBatch
from jaxllm.cache.recurrent import MatrixState
from pallas_kernels import tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurrentWindow:
    """``state`` before the window, the window itself, the convolution's raw inputs [B, W, C] and the factors of the
    recurrence, of :mod:`pallas_kernels.ssd.window` or :mod:`pallas_kernels.gated_delta.window`."""

    state: MatrixState
    batch: PackedBatch
    inputs: Leaf
    factors: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CacheWindow:
    """The window states of all layers, one entry per pattern letter (None where a layer keeps nothing), and the tables
    and lengths that they go on from."""

    layers: tuple[Any, ...]
    groups: tuple[Any, ...] = ()


def window_ancestors(batch: PackedBatch) -> Bool[Array, "B W W"]:
    """``[b, i, j]``: node j is i or above it, and neither is padding.

    Raises:
        ValueError: ``parents`` or ``slots`` has not the shape of a window's.
    """
    rows, length = batch.shape
    for name, shape in (("parents", (rows, length)), ("slots", (rows, 1))):
        given = getattr(batch, name)
        if given is not None and given.shape != shape:
            raise ValueError(f"batch.{name}.shape={given.shape}: expected {shape} or None, one segment a row")
    parents = None if batch.parents is None else jnp.asarray(batch.parents)
    return tree.ancestors(parents, jnp.asarray(batch.segment_ids) > 0)


def accepted_nodes(batch: PackedBatch, path: Int[Array, "B m"], n: Int[Array, " B"]) -> Bool[Array, "B W"]:
    """The nodes among each row's first ``n`` of ``path``; padding is left out."""
    taken = jnp.arange(path.shape[1]) < n[:, None]
    hit = (path[:, :, None] == jnp.arange(batch.shape[1])) & taken[:, :, None]
    return jnp.any(hit, axis=1) & (batch.segment_ids > 0)


def committed_lengths(batch: PackedBatch, ancestors: Bool[Array, "B W W"]) -> Int[Array, "B 1"]:
    """Tokens that each row's slot has committed; 0 for a row of padding, which sees nothing anyway.

    What lies behind them was left by an earlier request, or by tokens that were never committed.
    """
    # Every live node tells the same number.
    start = jnp.where(batch.segment_ids > 0, batch.positions - tree.depths(ancestors), 0)
    return jnp.max(start, axis=1, keepdims=True)
