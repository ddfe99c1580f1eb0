"""Paged keys and values of one layer: sealed pages behind a table, and every slot's open tail (contract 4).

A slot's stored tokens are numbered in temporal order. The first ``length // page * page`` of them (fewer after a draft)
lie in pages, rounded as the pool keeps them; the rest are the open tail in a float dtype. A page is sealed once, when
it is full, so that nothing has to be unquantised or taken back.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.batch import Leaf
from jaxllm.cache.bits import load, store
from jaxllm.cache.policies.base import Policy, PolicyState
from jaxllm.cache.segments import Segments, by_segment
from jaxllm.cache.view import Layout, View
from pallas_kernels.paged_attention import QuantizedPages, dequantize_pages, quantize_pages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageGroup:
    """Layers with one retention rule share their tables and lengths.

    Attributes:
        table: i32[S, n], physical page of each page of a slot; P where it has none.
        length: i32[S], tokens that a slot stores.
        sealed: i32[S], how many of them lie in pages.
    """

    table: Leaf
    length: Leaf
    sealed: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedState:
    """One layer.

    Attributes:
        k: pool [P, K, page, d] of keys after RoPE, floats (bfloat16 as its bits) or QuantizedPages.
        v: of values, likewise.
        tail_k: [S, K, t, d], open tails; bfloat16 as its bits.
        tail_v: likewise.
        memory: what the policy remembers.
        policy: of this layer; static.
        layout: sizes; static.
        group: index of its :class:`PageGroup`; static.
        consecutive: slot s owns pages s n .. s n + n - 1, in this order, for ever; static.
        pages: the group while a step runs, else None.
    """

    k: Leaf
    v: Leaf
    tail_k: Leaf
    tail_v: Leaf
    memory: PolicyState
    policy: Policy = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})
    group: int = field(metadata={"static": True})
    consecutive: bool = field(metadata={"static": True})
    pages: PageGroup | None = None


def pool_of(layout: Layout, dtype: Any, bits: int | None, per_channel: bool = False) -> Any:
    """A zeroed pool."""
    shape = (layout.pages, layout.kv_heads, layout.page, layout.head_dim)
    if bits is None:
        return jnp.zeros(shape, dtype)
    codes = jnp.zeros((*shape[:3], shape[3] * bits // 8), jnp.uint8)
    scale = (*shape[:2], 1, shape[3]) if per_channel else (*shape[:3], 1)
    return QuantizedPages(codes, jnp.zeros(scale, jnp.float16), jnp.zeros(scale, jnp.float16), bits)


def readable(pool: Any) -> Any:
    """A pool as attention takes it."""
    return pool if isinstance(pool, QuantizedPages) else load(pool)


def _sealable(pool: Any, pages: Float[Array, "m K page d"]) -> tuple[Any, Any]:
    """(what the pool keeps of pages, the same as attention will multiply it in float32)."""
    if isinstance(pool, QuantizedPages):
        made = quantize_pages(
            pages, bits=pool.bits, per_channel=pool.per_channel, scale_dtype=pool.scale.dtype
        )
        return made, dequantize_pages(made)
    kept = store(pages, pool.dtype)
    return kept, load(kept).astype(jnp.float32)


def put_pages(
    state: PagedState,
    physical: Int[Array, " m"],
    k: Float[Array, "m K page d"],
    v: Float[Array, "m K page d"],
) -> PagedState:
    """Seal whole pages at ``physical`` (P: none), and tell the policy."""
    pools, seen = [], []
    for pool, pages in ((state.k, k), (state.v, v)):
        kept, read = _sealable(pool, pages)
        pools.append(jax.tree.map(lambda p, w: p.at[physical].set(w, mode="drop"), pool, kept))
        seen.append(read)
    memory = state.policy.on_append(state.memory, physical, *seen)
    return replace(state, k=pools[0], v=pools[1], memory=memory)


@dataclass(frozen=True)
class Joined:
    """The open tails of V segments with the step's tokens behind them.

    Attributes:
        k: [V, K, t + T, d].
        v: likewise.
        before: i32[V], tokens of the tail.
        length: i32[V], tail and step together.
        sealed: i32[V], tokens in pages.
        slots: i32[V], S where there is none.
    """

    k: Any
    v: Any
    before: Any
    length: Any
    sealed: Any
    slots: Any


def of_slots(values: Leaf, segments: Segments, whole: bool) -> Any:
    """[S, ...] as [V, ...]; ``whole``: row r is slot r."""
    if whole:
        return values[: len(segments.slots)]
    return values.at[segments.slots].get(mode="fill", fill_value=0)


def join(
    state: PagedState, segments: Segments, k: Float[Array, "B T K d"], v: Float[Array, "B T K d"], whole: bool
) -> Joined:
    """Open tails and a step's tokens, in order; the first are read as the step's dtype."""
    pages = state.pages
    assert pages is not None
    sealed = of_slots(pages.sealed, segments, whole)
    before = of_slots(pages.length, segments, whole) - sealed
    size = state.layout.tail

    def joined(tail: Leaf, new: Array) -> Array:
        tail = load(of_slots(tail, segments, whole))
        new = jnp.swapaxes(by_segment(new, segments), 1, 2).astype(tail.dtype)
        T = new.shape[2]
        index = jnp.arange(size + T) - before[:, None]
        at = jnp.where(index < 0, jnp.arange(size + T), size + jnp.clip(index, 0, T - 1))
        both = jnp.concatenate([tail, new], axis=2)
        return jnp.take_along_axis(both, at[:, None, :, None], axis=2)

    # What a slot has no room for is dropped.
    room = state.layout.pages_per_slot * state.layout.page - sealed
    length = jnp.minimum(before + segments.count, jnp.maximum(room, before))
    return Joined(joined(state.tail_k, k), joined(state.tail_v, v), before, length, sealed, segments.slots)


def settle(state: PagedState, joined: Joined, table: Int[Array, "V n"], sealing: bool = True) -> PagedState:
    """``state`` after the step: pages that are full are sealed, the rest is the new tail.

    Args:
        state: with its group.
        joined: of :func:`join`.
        table: pages of every segment's slot.
        sealing: False leaves everything in the tail, from where it can be rolled back.
    """
    pages, page, size = state.pages, state.layout.page, state.layout.tail
    assert pages is not None
    total = joined.k.shape[2]
    full = joined.length // page if sealing else jnp.zeros_like(joined.length)
    if sealing:
        state = _seal(state, joined, table, full)
    # Segments without tokens keep their tail bit by bit.
    slots = jnp.where(joined.length > joined.before, joined.slots, state.layout.slots)
    at = jnp.minimum(full[:, None] * page + jnp.arange(size), total - 1)[:, None, :, None]

    def kept(tail: Leaf, values: Array) -> Leaf:
        return tail.at[slots].set(store(jnp.take_along_axis(values, at, axis=2), tail.dtype), mode="drop")

    length = joined.sealed + joined.length
    group = replace(
        pages,
        length=pages.length.at[slots].set(length, mode="drop"),
        sealed=pages.sealed.at[slots].set(joined.sealed + full * page, mode="drop"),
    )
    return replace(
        state, tail_k=kept(state.tail_k, joined.k), tail_v=kept(state.tail_v, joined.v), pages=group
    )


def _seal(state: PagedState, joined: Joined, table: Int[Array, "V n"], full: Int[Array, " V"]) -> PagedState:
    """The first ``full`` pages of every segment's joined tokens, in the pool."""
    page, none = state.layout.page, state.layout.pages
    V, K, total, d = joined.k.shape
    index = jnp.arange(total // page)
    logical = joined.sealed[:, None] // page + index
    physical = jnp.take_along_axis(table, jnp.minimum(logical, table.shape[1] - 1), axis=1)
    good = (index < full[:, None]) & (logical < table.shape[1]) & (joined.slots < state.layout.slots)[:, None]

    def paged(values: Array) -> Array:
        cut = values[:, :, : len(index) * page].reshape(V, K, -1, page, d)
        return jnp.swapaxes(cut, 1, 2).reshape(-1, K, page, d)

    return put_pages(state, jnp.where(good, physical, none).reshape(-1), paged(joined.k), paged(joined.v))


def view_of(state: PagedState, segments: Segments, table: Int[Array, "V n"], whole: bool) -> View:
    """What the policy sees of the segments' slots after a step."""
    pages = state.pages
    assert pages is not None
    sealed = of_slots(pages.sealed, segments, whole)
    return View(
        slots=segments.slots,
        table=table,
        sealed=sealed,
        k_pages=state.k,
        v_pages=state.v,
        tail_k=load(of_slots(state.tail_k, segments, whole)),
        tail_v=load(of_slots(state.tail_v, segments, whole)),
        tail_len=of_slots(pages.length, segments, whole) - sealed,
        scale=state.layout.scale,
    )


def open_view(state: PagedState, joined: Joined, table: Int[Array, "V n"]) -> View:
    """What the policy sees before a decode step's token is sealed: it is in the tail."""
    return View(
        slots=joined.slots,
        table=table,
        sealed=joined.sealed,
        k_pages=state.k,
        v_pages=state.v,
        tail_k=joined.k,
        tail_v=joined.v,
        tail_len=joined.length,
        scale=state.layout.scale,
    )
