"""Context parallelism: packed documents cut into blocks that any worker may hold.

What plans needs NumPy only; what runs a plan loads at its first use, and JAX with it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from parallel.context.arrays import DIAGONAL, FULL, SEGMENT, Capacity, PlanArrays
from parallel.context.contiguous import contiguous_lanes
from parallel.context.lanes import Lanes, make_lanes
from parallel.context.layout import Layout, layout
from parallel.context.lengths import DISTRIBUTIONS, draw_lengths
from parallel.context.placement import STRATEGIES, Strategy
from parallel.context.plan import Balance, Plan, PlanConfig, make_plan
from parallel.context.rounds import ROUNDS, Links, Rounds
from parallel.context.traffic import compiled_bytes, planned_bytes

if TYPE_CHECKING:
    from parallel.context.attention import context_attention
    from parallel.context.batch import SCATTER_STRATEGIES, Placed, Room, ScatterConfig, scatter
    from parallel.context.exchange import BACKENDS, Exchange, own, plan_specs
    from parallel.context.halo import causal_conv, dynamic_conv
    from parallel.context.recurrence import gated_delta, ssd
    from parallel.context.reshuffle import from_slots, to_slots
    from parallel.context.rows import lane_specs
    from parallel.context.scattered import Scattered
    from parallel.context.ulysses import shares, ulysses_attention, ulysses_plan

_HOMES = {
    "BACKENDS": "exchange",
    "SCATTER_STRATEGIES": "batch",
    "Placed": "batch",
    "Room": "batch",
    "ScatterConfig": "batch",
    "Scattered": "scattered",
    "scatter": "batch",
    "Exchange": "exchange",
    "causal_conv": "halo",
    "context_attention": "attention",
    "dynamic_conv": "halo",
    "from_slots": "reshuffle",
    "gated_delta": "recurrence",
    "lane_specs": "rows",
    "own": "exchange",
    "plan_specs": "exchange",
    "shares": "ulysses",
    "ssd": "recurrence",
    "to_slots": "reshuffle",
    "ulysses_attention": "ulysses",
    "ulysses_plan": "ulysses",
}

__all__ = [
    "BACKENDS",
    "DIAGONAL",
    "DISTRIBUTIONS",
    "FULL",
    "ROUNDS",
    "SCATTER_STRATEGIES",
    "SEGMENT",
    "STRATEGIES",
    "Balance",
    "Capacity",
    "Exchange",
    "Lanes",
    "Layout",
    "Links",
    "Placed",
    "Plan",
    "PlanArrays",
    "PlanConfig",
    "Room",
    "Rounds",
    "ScatterConfig",
    "Scattered",
    "Strategy",
    "causal_conv",
    "compiled_bytes",
    "context_attention",
    "contiguous_lanes",
    "draw_lengths",
    "dynamic_conv",
    "from_slots",
    "gated_delta",
    "lane_specs",
    "layout",
    "make_lanes",
    "make_plan",
    "own",
    "plan_specs",
    "planned_bytes",
    "scatter",
    "shares",
    "ssd",
    "to_slots",
    "ulysses_attention",
    "ulysses_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
