"""Trees of tokens inside a window: who is whose ancestor, how deep each node lies, and what stands before it.

A window [B, W] goes on from a committed prefix. ``parents`` names each node's parent inside the window, -1 the
prefix itself. Padding is transparent: it is nobody's ancestor, has no depth, and a node whose parent is padding hangs
on that padding's own parent. So the one mask ``ancestors`` holds all that an op needs: its diagonal is the live
nodes, its row sums are the depths.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def ancestors(parents: Int[Array, "B W"] | None, live: Bool[Array, "B W"]) -> Bool[Array, "B W W"]:
    """``[b, i, j]``: j is an ancestor of i or i itself, both live; by pointer doubling (SpecEdge, arXiv 2505.17052).

    Args:
        parents: parent of each node inside the window, in any order but without a circle; -1: the committed prefix.
            None: a chain, each node the child of the one before it.
        live: False at padding.
    """
    W = live.shape[1]
    pair = live[:, :, None] & live[:, None, :]
    if parents is None:
        return pair & jnp.tril(jnp.ones((W, W), bool))
    node = jnp.arange(W)
    # One row more for the prefix, its own parent, which has no ancestor in the window.
    jump = jnp.pad(jnp.where(parents < 0, W, parents), ((0, 0), (0, 1)), constant_values=W)
    reached = jnp.broadcast_to(jnp.pad(node[:, None] == node, ((0, 1), (0, 0))), (live.shape[0], W + 1, W))
    for _ in range((W - 1).bit_length()):
        reached = reached | jnp.take_along_axis(reached, jump[:, :, None], axis=1)
        jump = jnp.take_along_axis(jump, jump, axis=1)
    return pair & reached[:, :W]


def depths(ancestors: Bool[Array, "B W W"]) -> Int[Array, "B W"]:
    """Live nodes above each node inside the window: 0 for a child of the prefix, -1 for padding."""
    return jnp.sum(ancestors, axis=-1, dtype=jnp.int32) - 1


def preceding(
    members: Bool[Array, "B m W"], depth: Int[Array, "B W"], since: Int[Array, "B m"], before: int, count: int
) -> Int[Array, "B m count"]:
    """Where the ``count`` rows that end at depth ``since`` of each path lie, oldest first.

    Args:
        members: the nodes of each path.
        depth: of every node.
        since: depth of each path's last row; -1: the prefix's last row.
        before: rows of the prefix that are kept.
        count: how many rows to name, at most ``before + 1 + since``.

    Returns:
        indices into (the prefix's last ``before`` rows, the window's W rows).
    """
    wanted = since[:, :, None] + jnp.arange(1 - count, 1, dtype=jnp.int32)
    hit = members[:, :, None, :] & (depth[:, None, None, :] == wanted[..., None])
    node = jnp.argmax(hit, axis=-1).astype(jnp.int32)
    return jnp.where(wanted < 0, jnp.maximum(before + wanted, 0), before + node)
