"""Ulysses sequence parallelism: all tokens and a share of the heads for every worker, instead of a share of the tokens.

DeepSpeed-Ulysses (arXiv 2309.14509), a baseline of :mod:`parallel.context.attention`. Workers are limited by key heads, and
no worker computes before it has everything.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from parallel.context.arrays import Capacity, PlanArrays
from parallel.context.attention import context_attention
from parallel.context.exchange import Exchange
from parallel.context.layout import Layout
from parallel.context.plan import Plan, PlanConfig, make_plan


def ulysses_plan(
    lengths: Sequence[int] | np.ndarray,
    workers: int,
    block: int = 4096,
    at_least: Capacity | None = None,
    window: int | None = None,
) -> Plan:
    """A plan for one worker, whose slots ``workers`` share equally: of its S slots worker w holds those from w S / N.

    Args:
        lengths: tokens of each document.
        workers: devices that share the slots.
        block: tokens of a block.
        at_least: as :func:`parallel.context.plan.make_plan` takes it.
        window: of :class:`parallel.context.plan.PlanConfig`.

    Raises:
        ValueError: as :func:`parallel.context.plan.make_plan`.
    """
    config = PlanConfig(1, block, "ring", window=window)
    plan = make_plan(lengths, config, at_least)
    capacity = replace(plan.capacity, slots=-(-plan.capacity.slots // workers) * workers)
    return plan if capacity == plan.capacity else make_plan(lengths, config, at_least=capacity)


def ulysses_attention(
    q: Float[Array, "S block H d"],
    k: Float[Array, "S block K d"],
    v: Float[Array, "S block K d"],
    plan: PlanArrays,
    places: Layout,
    exchange: Exchange,
    **options: Any,
) -> Float[Array, "S block H d"] | tuple[Float[Array, "S block H d"], Float[Array, "S block H"]]:
    """Causal attention within documents, heads exchanged for tokens before it and back after it.

    To be called inside ``jax.shard_map`` (``check_vma=False``) over the axis of the exchange.

    Args:
        q: a worker's share of the slots.
        k: its keys.
        v: its values.
        plan: the arrays of :func:`ulysses_plan`, without their axis of one worker; the same for all workers.
        places: the worker's share of the plan's layout.
        exchange: its capacity is that of the plan, for one worker; no back end is used.
        options: as :func:`parallel.context.attention.context_attention` takes them.

    Returns:
        As :func:`parallel.context.attention.context_attention`.

    Raises:
        ValueError: the workers do not divide the heads of queries or of keys; or as ``context_attention``.
    """
    axis = exchange.axis_name
    workers = lax.axis_size(axis)
    for name, heads in (("query", q.shape[2]), ("key", k.shape[2])):
        if heads % workers:
            raise ValueError(
                f"ulysses: {heads} {name} heads on {workers} workers: must be a multiple of the workers; "
                "other strategies have no such limit"
            )
    q, k, v = (lax.all_to_all(x, axis, split_axis=2, concat_axis=0, tiled=True) for x in (q, k, v))
    everywhere = Layout(*(lax.all_gather(x, axis, tiled=True) for x in places))
    alone = Exchange(exchange.capacity, axis_name=())
    found = context_attention(q, k, v, plan, everywhere, alone, **options)
    return jax.tree.map(lambda x: lax.all_to_all(x, axis, split_axis=0, concat_axis=2, tiled=True), found)


def shares(places: Layout, workers: int) -> Layout:
    """A layout of one worker as one of ``workers``, each with its share of the slots."""
    return Layout(*(x.reshape(workers, -1, x.shape[-1]) for x in places))
