"""Which tokens survive: the last ones and the best of the others, for every KV head by itself."""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache.policies.base import Keep
from jaxllm.cache.view import View


def keep_best(scores: Float[Array, "B K L"], length: Int[Array, " B"], budget: int, recent: int) -> Keep:
    """The last ``recent`` stored tokens and those of the highest scores among the others, ``budget`` in all.

    Args:
        scores: finite; of two equal ones the older token stays.
        length: stored tokens; a row that has no more than ``budget`` keeps all.
        budget: tokens kept of every head.
        recent: how many of them are the last; at most ``budget``.
    """
    tokens = scores.shape[-1]
    number, end = jnp.arange(tokens), length[:, None, None]
    scores = jnp.where(number >= end - recent, jnp.inf, scores)
    _, best = lax.top_k(jnp.where(number < end, scores, -jnp.inf), min(budget, tokens))
    # Temporal order decides what the next eviction calls recent, and what pooling calls near. Not stored sorts last.
    best = jnp.sort(jnp.where(best < end, best, tokens), axis=-1)
    return Keep(best.astype(jnp.int32), jnp.minimum(length, budget))


def by_row(
    view: View, rows: Bool[Array, " B"], score: Callable[[View], Float[Array, "K L"]]
) -> Float[Array, "B K L"]:
    """``score`` of one row's view after the other; zeros, at no cost, where ``rows`` is false.

    Rows reach their budget in different steps, and what scores are made of is too large for all rows at once.
    """
    heads = view.tail_k.shape[1]

    def one(row):
        wanted, slots, table, sealed, tail_k, tail_v, tail_len = row
        alone = replace(
            view,
            slots=slots[None],
            table=table[None],
            sealed=sealed[None],
            tail_k=tail_k[None],
            tail_v=tail_v[None],
            tail_len=tail_len[None],
        )
        nothing = jnp.zeros((heads, view.tokens), jnp.float32)
        return lax.cond(wanted, lambda: score(alone), lambda: nothing)

    return lax.map(one, (rows, view.slots, view.table, view.sealed, view.tail_k, view.tail_v, view.tail_len))
