"""What a policy's ``maintain`` does to a layer: stored tokens leave, and pages are written anew."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxllm.cache.bits import store
from jaxllm.cache.paged import PagedState, put_pages
from jaxllm.cache.policies.base import Keep
from jaxllm.cache.view import View


def maintained(
    state: PagedState, view: View, ended: Bool[Array, " V"], able: Bool[Array, " V"]
) -> PagedState:
    """``state`` after the policy's periodic work, where a row needs any and is ``able``: it grew, and
    its prompt does not go on."""
    rows = state.policy.triggers(state.memory, view, ended)
    if rows is None:
        return state
    rows = rows & able & (view.slots < state.layout.slots)

    def work(state: PagedState) -> PagedState:
        # The branch's own pools: those of ``view`` would enter it beside them.
        inside = replace(view, k_pages=state.k, v_pages=state.v)
        memory, keep = state.policy.maintain(state.memory, inside, rows)
        state = replace(state, memory=memory)
        return state if keep is None else _rewritten(state, inside, keep, rows)

    return jax.lax.cond(jnp.any(rows), work, lambda state: state, state)


def _rewritten(state: PagedState, view: View, keep: Keep, rows: Bool[Array, " V"]) -> PagedState:
    """Kept tokens in the slot's first pages and its tail."""
    layout, pages = state.layout, state.pages
    assert pages is not None
    page, size = layout.page, layout.tail
    V, K, m = keep.tokens.shape
    count = jnp.where(rows, keep.count, 0)
    tokens = jnp.where(jnp.arange(m) < count[:, None, None], keep.tokens, -1)
    most = min(m // page, view.table.shape[1])
    whole = jnp.minimum(count // page, most)
    k, v = view.read_keys(tokens), view.read_values(tokens)

    def paged(values: Array) -> Array:
        cut = values[:, :, : most * page].reshape(V, K, most, page, values.shape[-1])
        return jnp.swapaxes(cut, 1, 2).reshape(V * most, K, page, values.shape[-1])

    index = jnp.arange(most)
    physical = jnp.where(rows[:, None] & (index < whole[:, None]), view.table[:, :most], layout.pages)
    state = put_pages(state, physical.reshape(-1), paged(k), paged(v))
    slots = jnp.where(rows, view.slots, layout.slots)
    at = jnp.minimum(whole[:, None] * page + jnp.arange(size), m - 1)[:, None, :, None]

    def tail(old: Array, values: Array) -> Array:
        return old.at[slots].set(store(jnp.take_along_axis(values, at, axis=2), old.dtype), mode="drop")

    group = replace(
        pages,
        length=pages.length.at[slots].set(count, mode="drop"),
        sealed=pages.sealed.at[slots].set(whole * page, mode="drop"),
    )
    return replace(state, tail_k=tail(state.tail_k, k), tail_v=tail(state.tail_v, v), pages=group)
