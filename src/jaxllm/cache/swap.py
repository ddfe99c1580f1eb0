"""All that one slot is, taken out of the pools and put back elsewhere, bit by bit: for requests that have to wait."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxllm.cache.paged import PagedState
from jaxllm.cache.state import Cache, restored, snapshot


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parked:
    """One slot.

    Attributes:
        pages: of every paged layer its keys, values and ``per_page`` arrays, [n, ...] in logical order, else None.
        tails: of every paged layer its tails and ``per_slot`` arrays, [1, ...], else None.
        states: recurrent states and rings, [1, ...], else None.
        lengths: of every group (stored tokens, sealed tokens), i32[1] each.
    """

    pages: tuple[Any, ...]
    tails: tuple[Any, ...]
    states: tuple[Any, ...]
    lengths: tuple[Any, ...]


def _of_pages(state: PagedState) -> Any:
    return state.k, state.v, state.memory.per_page


def _of_slots(state: PagedState) -> Any:
    return state.tail_k, state.tail_v, state.memory.per_slot


def parked(cache: Cache, slot: Int[Array, ""]) -> Parked:
    """What ``slot`` is; the cache stays as it is."""
    pages, tails = [], []
    for state in cache.layers:
        if not isinstance(state, PagedState):
            pages.append(None)
            tails.append(None)
            continue
        row = cache.groups[state.group].table[slot]
        pages.append(
            jax.tree.map(lambda pool, row=row: pool.at[row].get(mode="fill", fill_value=0), _of_pages(state))
        )
        tails.append(jax.tree.map(lambda pool: pool[slot][None], _of_slots(state)))
    lengths = ((group.length[slot][None], group.sealed[slot][None]) for group in cache.groups)
    return Parked(tuple(pages), tuple(tails), snapshot(cache, slot[None]), tuple(lengths))


def unparked(cache: Cache, slot: Int[Array, ""], kept: Parked) -> Cache:
    """The inverse, into ``slot`` and the pages that its table names by now."""
    cache = restored(cache, slot[None], kept.states)
    layers = []
    for state, pages, tails in zip(cache.layers, kept.pages, kept.tails):
        if isinstance(state, PagedState):
            row = cache.groups[state.group].table[slot]
            used = jnp.arange(len(row)) < kept.lengths[state.group][1] // state.layout.page
            physical = jnp.where(used, row, state.layout.pages)
            k, v, per_page = jax.tree.map(
                lambda pool, value, at=physical: pool.at[at].set(value, mode="drop"), _of_pages(state), pages
            )
            tail_k, tail_v, per_slot = jax.tree.map(
                lambda pool, value: pool.at[slot].set(value[0]), _of_slots(state), tails
            )
            memory = replace(state.memory, per_page=per_page, per_slot=per_slot)
            state = replace(state, k=k, v=v, tail_k=tail_k, tail_v=tail_v, memory=memory)
        layers.append(state)
    groups = tuple(
        replace(
            group, length=group.length.at[slot].set(length[0]), sealed=group.sealed.at[slot].set(sealed[0])
        )
        for group, (length, sealed) in zip(cache.groups, kept.lengths)
    )
    return Cache(tuple(layers), groups)
