"""Trees of tokens inside a window: who is whose ancestor, how deep each node lies, and what stands before it.

A window [B, W] goes on from a committed prefix. ``parents`` names each node's parent inside the window, -1 the
prefix itself. Padding is transparent: it is nobody's ancestor, has no depth, and a node whose parent is padding hangs
on that padding's own parent. So the one mask ``ancestors`` holds all that an op needs: its diagonal is the live
nodes, its row sums are the depths.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


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


def live_values(
    ancestors: Bool[Array, "B W W"], *values: Shaped[Array, "B W ..."]
) -> tuple[Float[Array, "B W ..."], ...]:
    """The arrays in float32, zero at padding."""
    live = jnp.diagonal(ancestors, axis1=1, axis2=2)
    return tuple(
        jnp.where(live.reshape(*live.shape, *[1] * (v.ndim - 2)), v.astype(jnp.float32), 0) for v in values
    )


def path_sums(ancestors: Bool[Array, "B W W"], x: Float[Array, "B W H"]) -> Float[Array, "B W H"]:
    """Sum of ``x`` over each node and its ancestors."""
    return jnp.einsum("bij,bjh->bih", ancestors.astype(jnp.float32), x, precision="highest")


def path_decays(ancestors: Bool[Array, "B W W"], sums: Float[Array, "B H W"]) -> Float[Array, "B H W W"]:
    """``exp(S_i - S_j)``, the decay from node j down to i, where j is i or above it; 0 elsewhere.

    Args:
        ancestors: as :func:`ancestors` gives it.
        sums: S, of log decays, as :func:`path_sums` gives them.
    """
    # Masked before the exponential: from a node to one that is not its ancestor the difference may overflow.
    return jnp.exp(jnp.where(ancestors[:, None], sums[..., :, None] - sums[..., None, :], -jnp.inf))


def state_after(
    sums: Float[Array, "B W H"],
    accepted: Bool[Array, "B W"],
    initial_state: Float[Array, "B H _ _"],
    written: Callable[[Float[Array, "B W H"]], Float[Array, "B H _ _"]],
) -> Float[Array, "B H _ _"]:
    """The float32 state of a linear recurrence after one path: what was there, decayed, and what its nodes wrote.

    Args:
        sums: of log decays, which are at most 0, on the path to each node.
        accepted: the nodes of the path. None of a row's: its state is kept bit by bit.
        initial_state: state before the window.
        written: the sum of all nodes' writes, each times its weight: the decay from the node to the path's last one,
            0 off the path.
    """
    initial_state = initial_state.astype(jnp.float32)
    # The path's last node has the least sum; no path: 0.
    last = jnp.min(jnp.where(accepted[..., None], sums, 0), axis=1)
    weights = jnp.exp(jnp.where(accepted[..., None], last[:, None] - sums, -jnp.inf))
    new = jnp.exp(last)[..., None, None] * initial_state + written(weights)
    return jnp.where(jnp.any(accepted, axis=1)[:, None, None, None], new, initial_state)
