"""What the entries of a page table mean: the one definition that every implementation shares."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.arguments import require


def translate(
    page_table: Int[Array, "B K n"], logical: Int[Array, "B K m"], *, page: int, granularity: str
) -> Int[Array, "B K m"]:
    """Physical pages of a policy's selection: the ``table`` that stands beside its ``logical``.

    Args:
        page_table: physical page of each logical page of a row and KV head.
        logical: selected logical pages or tokens; -1 = none.
        page: tokens of a page.
        granularity: "page" or "token": what ``logical`` counts.

    Raises:
        ValueError: ``granularity`` is not as above.
    """
    require(granularity in ("page", "token"), "granularity", granularity, "'page' or 'token'")
    index = logical if granularity == "page" else logical // page
    return jnp.take_along_axis(page_table, jnp.maximum(index, 0), axis=2)


def window_mask(ancestors: Bool[Array, "B W W"], before: Int[Array, " B"], size: int) -> Bool[Array, "B W t"]:
    """``tail_mask`` of a tail that holds ``before`` committed tokens and then the window's own W.

    Args:
        ancestors: as :func:`pallas_kernels.tree.ancestors` gives it.
        before: committed tokens in the tail, seen by every live node.
        size: t, the tokens that the tail has room for.
    """
    W = ancestors.shape[1]
    node = jnp.arange(size) - before[:, None]
    inside = (node >= 0) & (node < W)
    own = jnp.take_along_axis(ancestors, jnp.clip(node, 0, W - 1)[:, None, :], axis=2) & inside[:, None, :]
    live = jnp.diagonal(ancestors, axis1=1, axis2=2)
    return own | (live[:, :, None] & (node < 0)[:, None, :])


def indices(
    shape: tuple[int, ...],
    page: int,
    logical: Int[Array, "B K n"] | None,
    count: Int[Array, "B K"] | None,
    granularity: str,
) -> Int[Array, "B K n p"]:
    """Logical token of every key that the entries of a table [B, K, n] name, -1 where an entry names none.

    ``shape`` is (B, K, n); p is ``page``, or 1 for tokens. ``logical`` None: entry i is logical page i.
    """
    n = shape[2]
    entry = jnp.arange(n, dtype=jnp.int32)
    named = jnp.broadcast_to(entry, shape) if logical is None else logical
    named = named if count is None else jnp.where(entry < count[..., None], named, -1)
    if granularity == "token":
        return named[..., None]
    named = named[..., None]
    return jnp.where(named < 0, -1, named * page + jnp.arange(page, dtype=jnp.int32))


def seen_sealed(
    tokens: Int[Array, "B K s"],
    kv_len: Int[Array, "B K"],
    q_positions: Int[Array, "B W"],
    window: int | None,
) -> Bool[Array, "B K W s"]:
    """Which sealed keys a query sees: those that are there, not later than it, and within the window."""
    there = (tokens >= 0) & (tokens < kv_len[..., None])
    distance = q_positions[:, None, :, None] - tokens[:, :, None, :]
    seen = there[:, :, None, :] & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def seen_tail(
    tail_len: Int[Array, " B"],
    tail_positions: Int[Array, "B t"],
    tail_mask: Bool[Array, "B W t"] | None,
    q_positions: Int[Array, "B W"],
    window: int | None,
) -> Bool[Array, "B 1 W t"]:
    """Which keys of the open tail a query sees; a query of negative position sees none."""
    there = jnp.arange(tail_positions.shape[1]) < tail_len[:, None]
    distance = q_positions[:, :, None] - tail_positions[:, None, :]
    seen = there[:, None, :] & (distance >= 0) & (q_positions >= 0)[:, :, None]
    seen = seen if window is None else seen & (distance < window)
    return (seen if tail_mask is None else seen & tail_mask)[:, None]
