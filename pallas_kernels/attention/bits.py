"""A mask over few keys as bits: a word or two for each query, so that a kernel reads no array of pairs.

A tree of proposed tokens is verified in windows of at most 64, whose nodes see their ancestors only (SpecEdge, arXiv
2505.17052). Each key owns one bit: a query sees the keys whose bits its words hold.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

_WORD = 32
# Two words a query.
MOST_KEYS = 2 * _WORD


def words(mask: Bool[Array, "B T S"]) -> tuple[Int[Array, "B w T"], Int[Array, "B w S"]]:
    """What each query holds and what each key owns, i32 words of 32 bits: ``mask[b, t, s]`` iff they share a bit."""
    B, T, S = mask.shape
    count = -(-S // _WORD)
    padded = jnp.pad(mask, ((0, 0), (0, 0), (0, count * _WORD - S))).reshape(B, T, count, _WORD)
    at = jnp.arange(count * _WORD, dtype=jnp.uint32)
    bit = jnp.uint32(1) << at % _WORD
    held = jnp.sum(jnp.where(padded, bit.reshape(count, _WORD), 0), axis=3, dtype=jnp.uint32)
    owned = jnp.where(at // _WORD == jnp.arange(count)[:, None], bit, 0)[:, :S]
    owned = jnp.broadcast_to(owned, (B, count, S))
    return tuple(jax.lax.bitcast_convert_type(w, jnp.int32) for w in (held.swapaxes(1, 2), owned))  # type: ignore[return-value]
