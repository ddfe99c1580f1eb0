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

if TYPE_CHECKING:
    from parallel.context.exchange import BACKENDS, Exchange, own, plan_specs

_HOMES = {
    "BACKENDS": "exchange",
    "Exchange": "exchange",
    "own": "exchange",
    "plan_specs": "exchange",
}

__all__ = [
    "BACKENDS",
    "DIAGONAL",
    "DISTRIBUTIONS",
    "FULL",
    "ROUNDS",
    "SEGMENT",
    "STRATEGIES",
    "Balance",
    "Capacity",
    "Exchange",
    "Lanes",
    "Layout",
    "Links",
    "Plan",
    "PlanArrays",
    "PlanConfig",
    "Rounds",
    "Strategy",
    "contiguous_lanes",
    "draw_lengths",
    "layout",
    "make_lanes",
    "make_plan",
    "own",
    "plan_specs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
