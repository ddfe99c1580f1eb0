"""Attention over blocks that lie on many workers: each computes its plan's pairs, keys arriving stage by stage.

FCP (arXiv 2605.08524). The mathematics is that of :mod:`pallas_kernels.attention`; parts are merged by their log-sum-exp.
Ring, zig-zag and per-document parallelism are the same program with other plans.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import attention, attention_backward, merge
from parallel.context.arrays import Capacity, PlanArrays
from parallel.context.exchange import Exchange
from parallel.context.layout import Layout
from parallel.order import there


class _Keys(NamedTuple):
    """What a stage's queries look at; ``first`` is the number of the first slot in the plan's ``work``."""

    k: Float[Array, "n block K d"]
    v: Float[Array, "n block K d"]
    segment_ids: Int[Array, "n block"]
    positions: Int[Array, "n block"]
    first: int


@dataclass(frozen=True)
class _Options:
    """What is known when the program is traced."""

    exchange: Exchange
    window: int | None
    soft_cap: float | None
    scale: float | None
    operand_dtype: DTypeLike
    implementation: str

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of both entries of attention."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "exchange"}


def context_attention(
    q: Float[Array, "S block H d"],
    k: Float[Array, "S block K d"],
    v: Float[Array, "S block K d"],
    plan: PlanArrays,
    places: Layout,
    exchange: Exchange,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    operand_dtype: DTypeLike | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Float[Array, "S block H d"] | tuple[Float[Array, "S block H d"], Float[Array, "S block H"]]:
    """Causal attention within documents, of a worker's queries to the keys of all workers.

    To be called inside ``jax.shard_map`` (``check_vma=False``) over the axis of the exchange. The keys of a stage travel
    while those of the stage before are computed; at most two stages' keys are held. Backward fetches them again and sends
    their gradients home in float32, so that only the worker's own q, k, v, output and log-sum-exp are kept.

    Args:
        q: a worker's slots of queries, after any rotary embedding by ``places.positions``.
        k: its keys; padding may be anything finite.
        v: its values.
        plan: the worker's own arrays, of the exchange's capacity.
        places: its own layout.
        exchange: how blocks travel.
        window: as in :func:`pallas_kernels.attention.attention`; pairs of blocks outside it are not computed. Their keys
            travel all the same where the plan was made for a wider one.
        soft_cap: as there.
        scale: as there.
        operand_dtype: as there; parts and gradients are added in float32 whatever it is.
        return_lse: also return the log-sum-exp.
        implementation: as there.

    Returns:
        The output in the dtype of q, 0 at padding; with ``return_lse`` also float32 lse, -inf at padding.

    Raises:
        ValueError: slots, blocks or workers are not those of the exchange's capacity, or its window is smaller than this one; or as
            attention does.
    """
    capacity = exchange.capacity
    workers = lax.axis_size(exchange.axis_name)
    if workers != capacity.workers:
        raise ValueError(
            f"capacity workers={capacity.workers}: must be the {workers} of axis {exchange.axis_name!r}"
        )
    for name, array in (("q", q), ("k", k), ("v", v), ("places.index", places.index)):
        if array.shape[:2] != (capacity.slots, capacity.block):
            raise ValueError(
                f"{name}.shape={array.shape}: must begin with slots={capacity.slots}, block={capacity.block}"
            )
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be None or at least 1")
    if capacity.window is not None and (window is None or window > capacity.window):
        raise ValueError(f"window={window}: must be at most {capacity.window}, which the plan was made for")
    operand_dtype = jnp.dtype(k.dtype if operand_dtype is None else operand_dtype)
    options = _Options(exchange, window, soft_cap, scale, operand_dtype, implementation)
    outputs: Any = _attend(options, q, k, v, plan, places)
    out, lse = outputs
    return (out, lse) if return_lse else out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, plan, places):
    return _attend_fwd(options, q, k, v, plan, places)[0]


def _attend_fwd(options, q, k, v, plan, places):
    def pair(row, keys, at, state):
        before = _row(state[0], row), _row(state[1], row)
        marks = _marks(places, row, keys, at)

        def seen():
            rows = _row(q, row).astype(jnp.float32), _row(keys.k, at), _row(keys.v, at)
            return merge(before, attention(*rows, **marks, **options.call, return_lse=True))

        now = _if_seen(options, marks, seen, lambda: before)
        return tuple(_put(x, row, new) for x, new in zip(state, now))

    def step(stage, keys, state):
        out, lse = _over_pairs(options, plan, stage, keys, pair, state)
        return (out, lse), (out,)

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)
    out, lse = _over_stages(options, plan, places, (k, v), step, start)
    out = out.astype(q.dtype)
    return (out, lse), (q, k, v, plan, places, out, lse)


def _attend_bwd(options, residuals, cotangents):
    q, k, v, plan, places, out, lse = residuals
    # Or else the compiler would keep what forward has fetched, instead of fetching it again.
    plan = _once_known(plan, cotangents[0])
    queries = q, out, lse, *cotangents

    def pair(row, keys, at, state):
        before = tuple(_row(x, n) for x, n in zip(state, (row, at, at)))
        marks = _marks(places, row, keys, at)

        def seen():
            q, *kept, dlse = (_row(x, row).astype(jnp.float32) for x in queries)
            kv = (_row(x, at).astype(jnp.float32) for x in (keys.k, keys.v))
            more = attention_backward(q, *kv, *kept, dlse=dlse, **marks, **options.call)
            return tuple(x + new for x, new in zip(before, more))

        now = _if_seen(options, marks, seen, lambda: before)
        return tuple(_put(x, n, new) for x, n, new in zip(state, (row, at, at), now))

    def step(stage, keys, state):
        dq, home = state
        if stage == 0:
            dq, *home = _over_pairs(options, plan, stage, keys, pair, (dq, *home))
            return (dq, tuple(home)), (dq,)
        # Not made before they are needed, or those of all stages would be held from the beginning.
        zero = jnp.where(there(dq), 0.0, 1.0)
        start = tuple(jnp.broadcast_to(zero, x.shape) for x in (keys.k, keys.v))
        dq, *away = _over_pairs(options, plan, stage, keys, pair, (dq, *start))
        # What the stage before gave back may take as long as this one.
        return (dq, options.exchange.give_back(home, tuple(away), plan, stage - 1)), (dq, *home)

    dq, *home = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, home = _over_stages(options, plan, places, (k, v), step, (dq, tuple(home)))
    return *(g.astype(x.dtype) for g, x in zip((dq, *home), (q, k, v))), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _over_stages(
    options: _Options,
    plan: PlanArrays,
    places: Layout,
    kv: tuple[jax.Array, jax.Array],
    step: Callable[[int, _Keys, Any], tuple[Any, tuple[jax.Array, ...]]],
    state: Any,
) -> Any:
    """``state, done = step(t, keys, state)`` for the worker's own keys, t = 0, then for those that each stage brings.

    What step t + 1 needs is asked for before step t, and neither needs the other: they overlap where collectives are
    asynchronous. It is asked for when ``done`` of step t - 1 is there, so that two stages are held, however many there are.
    """
    exchange, capacity = options.exchange, options.exchange.capacity
    coming = exchange.fetch(kv, plan, 0) if capacity.stages else None
    state, done = step(0, _Keys(*kv, places.segment_ids, places.positions, 0), state)
    for stage in range(1, capacity.stages + 1):
        keys = _arrived(capacity, plan, stage, coming)
        if stage < capacity.stages:
            coming = exchange.fetch(kv, _once_known(plan, *done), stage)
        state, done = step(stage, keys, state)
    return state


def _once_known(plan: PlanArrays, *done: jax.Array) -> PlanArrays:
    """The same plan, but nothing can be sent by it before all of ``done`` is there."""
    return plan._replace(send_slot=jnp.where(there(*done), plan.send_slot, -1))


def _arrived(capacity: Capacity, plan: PlanArrays, stage: int, kv: Any) -> _Keys:
    """Keys that a stage has brought; its blocks are full and of one document each."""
    rounds = slice((stage - 1) * capacity.stage_rounds, stage * capacity.stage_rounds)
    ramp = jnp.arange(capacity.block, dtype=jnp.int32)
    segment_ids = jnp.broadcast_to(
        plan.receive_document[rounds, None] + 1, (capacity.stage_rounds, len(ramp))
    )
    k, v = kv
    return _Keys(k, v, segment_ids, plan.receive_position[rounds, None] + ramp, capacity.slots)


def _over_pairs(
    options: _Options,
    plan: PlanArrays,
    stage: int,
    keys: _Keys,
    pair: Callable[[Any, _Keys, Any, Any], Any],
    state: Any,
) -> Any:
    """``pair(query slot, keys, key slot, state)`` for what the plan lists for a stage, as often as it lists."""

    def body(n, state):
        row, number = plan.work[n, 0], plan.work[n, 1]
        return pair(row, keys, number - keys.first, state)

    return lax.fori_loop(plan.work_start[stage], plan.work_start[stage + 1], body, state)


def _marks(places: Layout, row: Any, keys: _Keys, at: Any) -> dict[str, jax.Array]:
    return {
        "q_positions": _row(places.positions, row),
        "kv_positions": _row(keys.positions, at),
        "q_segment_ids": _row(places.segment_ids, row),
        "kv_segment_ids": _row(keys.segment_ids, at),
    }


def _if_seen(options: _Options, marks: dict[str, jax.Array], seen: Callable, hidden: Callable) -> Any:
    """Plans know documents and causality; whether a window leaves anything of a pair is found here."""
    if options.window is None:
        return seen()
    ids, own = marks["kv_segment_ids"], marks["q_segment_ids"]
    near = marks["q_positions"] - marks["kv_positions"].max() < options.window
    return lax.cond(jnp.any(near & (own >= ids.min()) & (own <= ids.max())), seen, hidden)


def _row(x: jax.Array, n: Any) -> jax.Array:
    """x[n] as a batch of one."""
    return lax.dynamic_slice_in_dim(x, n, 1)


def _put(x: jax.Array, n: Any, row: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, row, n, 0)
