"""Context parallelism: packed documents cut into blocks that any worker may hold."""

from parallel.context.arrays import DIAGONAL, FULL, SEGMENT, Capacity, PlanArrays
from parallel.context.contiguous import contiguous_lanes
from parallel.context.lanes import Lanes, make_lanes
from parallel.context.layout import Layout, layout
from parallel.context.lengths import DISTRIBUTIONS, draw_lengths
from parallel.context.placement import STRATEGIES, Strategy
from parallel.context.plan import Balance, Plan, PlanConfig, make_plan
from parallel.context.rounds import ROUNDS, Links, Rounds

__all__ = [
    "DIAGONAL",
    "DISTRIBUTIONS",
    "FULL",
    "ROUNDS",
    "SEGMENT",
    "STRATEGIES",
    "Balance",
    "Capacity",
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
]
