"""What the last queries of a sequence look at: a ring of them for every slot, and pooling along the keys.

SnapKV (arXiv 2404.14469) calls them the observation window; R-KV (arXiv 2505.24133) uses the same idea while decoding.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.cache.policies.base import Seen
from jaxllm.cache.view import Layout

POOLINGS = ("max", "mean")


def query_ring(layout: Layout, window: int) -> Float[Array, "S w H d"]:
    """Room for the last ``window`` queries of every slot; that at position p lies in entry p mod window."""
    heads = layout.kv_heads * layout.group
    return jnp.zeros((layout.slots, window, heads, layout.head_dim), jnp.float32)


def remember(ring: Float[Array, "S w H d"], slots: Int[Array, " B"], seen: Seen) -> Float[Array, "S w H d"]:
    """``ring`` with the step's queries; of more than ``window`` the last."""
    window = ring.shape[1]
    positions = seen.q_positions
    # Two queries of one entry in one scatter would leave either of them.
    newest = jnp.max(positions, axis=1, keepdims=True)
    kept = (positions >= 0) & (positions > newest - window)
    slot = jnp.where(kept, slots[:, None], ring.shape[0])
    return ring.at[slot, positions % window].set(seen.q.astype(ring.dtype), mode="drop")


def pool(scores: Float[Array, "*n L"], kernel: int, how: str, length: Int[Array, ""]) -> Float[Array, "*n L"]:
    """Every score becomes the largest, or the mean, of the ``kernel`` scores around it; 0 from ``length`` on.

    Args:
        scores: of keys in temporal order.
        kernel: odd.
        how: "max", what lies outside 0 .. length - 1 being no candidate; "mean", it being zeros that count.
        length: scores there are.
    """
    inside = jnp.arange(scores.shape[-1]) < length
    start, merge = (-jnp.inf, lax.max) if how == "max" else (0.0, lax.add)
    ones = (1,) * (scores.ndim - 1)
    padding = ((0, 0),) * (scores.ndim - 1) + ((kernel // 2, kernel // 2),)
    pooled = lax.reduce_window(
        jnp.where(inside, scores, start), start, merge, (*ones, kernel), (*ones, 1), padding
    )
    return jnp.where(inside, pooled if how == "max" else pooled / kernel, 0)
