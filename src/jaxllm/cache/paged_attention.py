"""Attention over paged keys and values: prefill chunks read all, decode steps and windows what the policy selects.

Everything is in the numbers of stored tokens, for queries as for keys: without eviction these are positions, and after
one they still order time.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.batch import PackedBatch
from jaxllm.cache.evict import maintained
from jaxllm.cache.options import AttendOptions
from jaxllm.cache.paged import Joined, PagedState, join, of_slots, open_view, readable, settle, view_of
from jaxllm.cache.policies.base import Seen, Selection
from jaxllm.cache.policies.heads import repeat_live
from jaxllm.cache.segments import Segments, segments_of
from jaxllm.cache.view import View
from pallas_kernels.attention import attention
from pallas_kernels.paged_attention import (
    OpenTail,
    QuantizedPages,
    dequantize_pages,
    paged_attention,
    translate,
    window_mask,
)


class Attended(NamedTuple):
    """What attention gave.

    Attributes:
        out: [B, T, H, d].
        lse: f32[B, T, H].
        mass: f32[B, K, L] as in :class:`Seen`, or None.
        read: i32[V, K], stored tokens read.
        stored: i32[V, K], tokens stored.
        recall: f32[V, K] or None, the share of the true probability that lies on what was read.
    """

    out: Any
    lse: Any
    mass: Any
    read: Any
    stored: Any
    recall: Any = None


def extend_paged(
    state: PagedState,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    batch: PackedBatch,
    options: AttendOptions,
) -> tuple[Float[Array, "B T H d"], PagedState, dict[str, Any]]:
    """Attention of a chunk or of a decode step that joins the slots, the layer after it, and taps."""
    whole, segments = batch.slots is None, segments_of(batch, state.layout.slots)
    table = slot_table(state, segments, whole, options.bound)
    joined = join(state, segments, k, v, whole)
    reading = batch.shape[1] > 1
    if not reading:
        before = open_view(state, joined, table)
        numbers = jnp.where(joined.length > joined.before, joined.sealed + joined.before, -1)
        tail = _open_tail(joined)
        done = _decode(state, q, before, numbers[:, None], tail, options, whole)
        tokens = numbers[:, None]
        joined = _after(joined, done)
    else:
        tokens = _numbers(segments, joined, batch)
        before = table[:, :0] if options.fresh else table
        done = _prefill(state, q, batch, segments, joined, before, tokens, options)
    state = settle(state, joined, slot_table(state, segments, whole, None), not options.drafting)
    if not options.drafting:
        positions = jnp.where(tokens >= 0, batch.positions, -1)
        seen = Seen(q, positions, tokens, done.lse, done.mass)
        state = learnt(state, segments, table, whole, seen, options.ended, reading=reading)
    return done.out, state, _reports(done, options)


def learnt(
    state: PagedState,
    segments: Segments,
    table: Int[Array, "V n"],
    whole: bool,
    seen: Seen,
    ended: Any,
    *,
    reading: bool,
) -> PagedState:
    """``state`` after the policy has observed a step and done its periodic work.

    ``reading``: the step is a piece of a prompt, which is maintained only when it has ended.
    """
    if len(segments.rows) != len(seen.q):
        seen = _seen_by_segment(seen, segments)
    view = view_of(state, segments, table, whole)
    if seen.mass is not None:
        # The step's view had another width.
        mass = seen.mass[:, :, : view.tokens]
        mass = jnp.pad(mass, ((0, 0), (0, 0), (0, view.tokens - mass.shape[2])))
        seen = seen._replace(mass=mass)
    state = replace(state, memory=state.policy.observe(state.memory, view, seen))
    # A slot that this step does not touch may be in the middle of its prompt.
    there = segments.count > 0
    ended = jnp.zeros_like(there) if ended is None else jnp.reshape(ended, -1) & there
    return maintained(state, view, ended, ended if reading else there)


def _seen_by_segment(seen: Seen, segments: Segments) -> Seen:
    """Rows of several segments as rows of one."""
    rows, order = segments.rows[:, None], segments.order
    there = jnp.arange(order.shape[1]) < segments.count[:, None]
    taken = [leaf[rows, order] for leaf in seen[:4]]
    q, positions, tokens, lse = taken
    return Seen(q, jnp.where(there, positions, -1), jnp.where(there, tokens, -1), lse, None)


def window_paged(
    state: PagedState,
    q: Float[Array, "B W H d"],
    k: Float[Array, "B W K d"],
    v: Float[Array, "B W K d"],
    batch: PackedBatch,
    ancestors: Bool[Array, "B W W"],
    depths: Int[Array, "B W"],
    options: AttendOptions,
) -> Attended:
    """Attention of a window's nodes over what their slot stores and their ancestors; nothing is written."""
    whole, segments = batch.slots is None, segments_of(batch, state.layout.slots)
    W = batch.shape[1]
    # All nodes in the order of their row, padding included: the mask knows them by it.
    nodes = segments._replace(order=jnp.broadcast_to(jnp.arange(W), (len(q), W)))
    joined = join(state, nodes, k, v, whole)
    live = jnp.asarray(batch.segment_ids) > 0
    numbers = jnp.where(live, (joined.sealed + joined.before)[:, None] + depths, -1)
    size = joined.k.shape[2]
    place = jnp.arange(size) - joined.before[:, None]
    node = jnp.take_along_axis(numbers, jnp.clip(place, 0, W - 1), axis=1)
    tail = OpenTail(
        joined.k,
        joined.v,
        jnp.where(jnp.any(live, axis=1), joined.before + W, 0),
        jnp.where(place < 0, joined.sealed[:, None] + jnp.arange(size), node),
        window_mask(ancestors, joined.before, size),
    )
    table = slot_table(state, segments, whole, options.bound)
    # Selection looks at what is committed.
    committed = replace(joined, length=joined.before)
    return _decode(state, q, open_view(state, committed, table), numbers, tail, options, whole, windowed=True)


def _decode(
    state: PagedState,
    q: Array,
    view: View,
    numbers: Int[Array, "B W"],
    tail: OpenTail,
    options: AttendOptions,
    whole: bool,
    windowed: bool = False,
) -> Attended:
    """Selected pages or tokens and the tail; all of them for rows that are due."""
    policy, memory = state.policy, state.memory
    selection = policy.select(memory, repeat_live(q, numbers >= 0), view)
    attend = partial(_attend, state, q, view, numbers, tail, options, whole)
    if selection is None:
        return attend(None, policy.wants_mass and not windowed)
    due = policy.due(memory, view)
    recall = "kv_recall" in options.taps

    done = attend(selection, False) if due is None else _due(attend, selection, due, view)
    if recall:
        share = _recall(attend(None, True).mass, selection, policy.granularity, view)
        done = done._replace(recall=share if due is None else jnp.where(due[:, None], 1, share))
    return done


def _due(attend: Any, selection: Selection, due: Bool[Array, " B"], view: View) -> Attended:
    """What is selected, and everything for the rows that are due, if any is; both carry a mass."""

    def everything() -> Attended:
        full, some = attend(None, True), attend(selection, False)

        def pick(a: Array, b: Array) -> Array:
            return jnp.where(due.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        return full._replace(
            out=pick(full.out, some.out),
            lse=pick(full.lse, some.lse),
            read=pick(full.read, some.read),
            mass=pick(full.mass, jnp.zeros_like(full.mass)),
        )

    def selected() -> Attended:
        none = jnp.zeros((*view.tail_k.shape[:2], view.tokens), jnp.float32)
        return attend(selection, False)._replace(mass=none)

    return jax.lax.cond(jnp.any(due), everything, selected)


def _recall(
    mass: Float[Array, "B K L"], selection: Selection, granularity: str, view: View
) -> Float[Array, "B K"]:
    """Probability of the selected tokens and the tail."""
    page = view.page if granularity == "page" else 1
    entry = jnp.arange(selection.logical.shape[2])
    named = jnp.where(entry < selection.count[..., None], selection.logical, -1)
    tokens = jnp.where(named[..., None] < 0, -1, named[..., None] * page + jnp.arange(page))
    tokens = tokens.reshape(*named.shape[:2], -1)
    sealed = (tokens >= 0) & (tokens < view.sealed[:, None, None])
    chosen = jnp.take_along_axis(mass, jnp.maximum(tokens, 0), axis=2)
    opened = jnp.where(jnp.arange(view.tokens) >= view.sealed[:, None, None], mass, 0)
    return jnp.sum(jnp.where(sealed, chosen, 0), axis=2) + jnp.sum(opened, axis=2)


def _attend(
    state: PagedState,
    q: Array,
    view: View,
    numbers: Any,
    tail: OpenTail,
    options: AttendOptions,
    whole: bool,
    selection: Selection | None,
    with_mass: bool,
) -> Attended:
    K, page = state.layout.kv_heads, state.layout.page
    table = jnp.broadcast_to(view.table[:, None], (len(view.table), K, view.table.shape[1]))
    kv_len = jnp.broadcast_to(view.sealed[:, None], (len(table), K))
    # Not those of the view: floats would have to be written out, whole pools of them, to enter a conditional's branch.
    k, v = readable(state.k), readable(state.v)
    named: dict[str, Any] = {"table": table}
    read = kv_len
    if selection is not None:
        logical, granularity = selection.logical, state.policy.granularity
        # What lies past the row's pages (an entry of no page) may be any page of the pool.
        picked = translate(table, logical, page=page, granularity=granularity)
        named = {"table": picked, "logical": logical, "count": selection.count, "granularity": granularity}
        read = selection.count * (page if granularity == "page" else 1)
    elif whole and state.consecutive:
        # Consecutive pages are read where they lie.
        n, used = state.layout.pages_per_slot, view.table.shape[1]
        k, v = (_first_pages(pool, len(table), n, used) for pool in (k, v))
        named = {"table": None}
    done = paged_attention(
        q,
        k,
        v,
        kv_len=kv_len,
        q_positions=numbers,
        tail=tail,
        operand_dtype=options.operand,
        return_mass=with_mass,
        implementation=options.implementation,
        **named,
    )
    mass = None
    if with_mass:
        sealed, within = done.mass
        sealed = sealed.reshape(*sealed.shape[:2], -1)
        number = jnp.arange(view.tokens) - view.sealed[:, None]
        at = jnp.where(number < 0, jnp.arange(view.tokens), sealed.shape[2] + jnp.maximum(number, 0))
        both = jnp.concatenate([sealed, within], axis=2)
        at = jnp.minimum(at, both.shape[2] - 1)[:, None]
        mass = jnp.where(view.stored()[:, None], jnp.take_along_axis(both, at, axis=2), 0)
    open_ = tail.length[:, None]
    return Attended(done.out, done.lse, mass, read + open_, kv_len + open_)


def _first_pages(pool: Any, rows: int, n: int, used: int) -> Any:
    def first(leaf: Array) -> Array:
        kept = leaf[: rows * n].reshape(rows, n, *leaf.shape[1:])[:, :used]
        return kept.reshape(rows * used, *leaf.shape[1:])

    return jax.tree.map(first, pool)


def _prefill(
    state: PagedState,
    q: Array,
    batch: PackedBatch,
    segments: Segments,
    joined: Joined,
    table: Int[Array, "V n"],
    tokens: Int[Array, "B T"],
    options: AttendOptions,
) -> Attended:
    """Everything stored and the chunk, dequantised, by (segment, number)."""
    B = len(q)
    V, K, size, d = joined.k.shape
    n = V // B
    sealed = table.shape[1] * state.layout.page
    keys, values = (
        jnp.concatenate([_all_pages(pool, table, open_.dtype), open_], axis=2)
        for pool, open_ in ((state.k, joined.k), (state.v, joined.v))
    )
    index = jnp.arange(sealed + size)
    numbers = jnp.where(index < sealed, index, joined.sealed[:, None] + index - sealed)
    there = jnp.where(index < sealed, index < joined.sealed[:, None], index - sealed < joined.length[:, None])
    owners = jnp.where(there, 1 + jnp.arange(V)[:, None] % n, 0)

    def by_row(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(B, n, K, -1, d), 1, 2).reshape(B, K, -1, d)

    out, lse = attention(
        q,
        by_row(keys),
        by_row(values),
        q_positions=jnp.maximum(tokens, 0),
        kv_positions=numbers.reshape(B, -1).astype(jnp.int32),
        q_segment_ids=batch.segment_ids,
        kv_segment_ids=owners.reshape(B, -1).astype(jnp.int32),
        kv_layout="BKTD",
        operand_dtype=options.operand,
        return_lse=True,
        implementation=options.implementation,
    )
    stored = jnp.broadcast_to((joined.sealed + joined.length)[:, None], (V, K))
    return Attended(out, lse, None, stored, stored)


def _all_pages(pool: Any, table: Int[Array, "V n"], dtype: Any) -> Float[Array, "V K s d"]:
    """Every sealed token of the segments' slots."""
    V, n = table.shape
    taken = jax.tree.map(lambda leaf: leaf.at[table.reshape(-1)].get(mode="fill", fill_value=0), pool)
    pages = dequantize_pages(taken) if isinstance(taken, QuantizedPages) else readable(taken)
    _, K, page, d = pages.shape
    return jnp.swapaxes(pages.astype(dtype).reshape(V, n, K, page, d), 1, 2).reshape(V, K, n * page, d)


def _open_tail(joined: Joined) -> OpenTail:
    place = jnp.arange(joined.k.shape[2])
    return OpenTail(joined.k, joined.v, joined.length, joined.sealed[:, None] + place)


def _after(joined: Joined, done: Attended) -> Joined:
    """``joined``, known only when attention is done.

    What seals pages must not run beside what reads them: XLA orders by data alone, and would copy both whole pools in
    every step to have either order right.
    """
    bits = jax.lax.bitcast_convert_type(done.out, jnp.uint16 if done.out.dtype.itemsize == 2 else jnp.uint32)
    # Never true, NaN or not, but not to the compiler.
    never = jnp.any((bits | 1) == 0)
    return replace(joined, length=joined.length + never)


def _numbers(segments: Segments, joined: Joined, batch: PackedBatch) -> Int[Array, "B T"]:
    """Number among the stored tokens of each of a chunk's tokens; -1 for padding and segments without slot."""
    start = (joined.sealed + joined.before).reshape(len(batch.tokens), -1)
    mine = jnp.take_along_axis(start, jnp.maximum(batch.segment_ids - 1, 0), axis=1)
    return jnp.where(segments.rank >= 0, mine + segments.rank, -1)


def slot_table(state: PagedState, segments: Segments, whole: bool, bound: int | None) -> Int[Array, "V n"]:
    """Pages of the segments' slots, as many as ``bound`` tokens need."""
    assert state.pages is not None
    n = state.layout.pages_per_slot
    n = n if bound is None else min(n, -(-bound // state.layout.page))
    return of_slots(state.pages.table, segments, whole)[:, :n]


def _reports(done: Attended, options: AttendOptions) -> dict[str, Any]:
    recall = jnp.ones(done.read.shape, jnp.float32) if done.recall is None else done.recall
    known = {"kv_read": done.read, "kv_stored": done.stored, "kv_recall": recall}
    return {name: value for name, value in known.items() if name in options.taps}
