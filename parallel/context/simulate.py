"""How long a layer of attention takes under each kind of context parallelism, from its real plan and stated costs.

The plans of :mod:`parallel.context.plan` say what every worker computes and receives, round by round;
:mod:`parallel.context.passes` plays them with the constants of :mod:`parallel.context.costs`. Rings are honest: they skip
what causality and documents mask, in work and in bytes, and overlap what they send with what they compute.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from parallel.context.costs import PASSES, AttentionShape, Costs, Pass
from parallel.context.groups import grouping
from parallel.context.magi import magi
from parallel.context.outcome import Result, added, result_of
from parallel.context.passes import STAY, Reshuffle, run
from parallel.context.plan import Plan, PlanConfig, make_plan
from parallel.context.rivals import causal_pairs, ulysses, zigzag_each
from parallel.context.rounds import Links
from parallel.context.work import spread_of, work_of

Kind = Literal["fcp", "fcp-pairs", "ring", "zigzag", "zigzag-each", "ulysses", "document", "magi", "grouping"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Passes = Literal["forward", "backward", "both"]
_WAYS: dict[str, tuple[Pass, ...]] = {**{way: (way,) for way in PASSES}, "both": PASSES}
_UNPLANNED = {"zigzag-each": zigzag_each, "ulysses": ulysses, "magi": magi, "grouping": grouping}


@dataclass(frozen=True)
class System:
    """What of FCP is switched on; each field down to ``reshuffle`` is a step of the ablation of arXiv 2605.08524, in its order.

    Attributes:
        pipeline: transfers run beside kernels.
        matched: rounds in which each worker sends and receives at most one block; otherwise it asks for the blocks that
            it needs in the order of documents, whoever else asks for them then.
        coalesced: as many rounds as the plan's stage has are one message and one kernel.
        reshuffle: tokens come in the order of the batch and return to it: ``exposed``, or ``overlapped`` with local work
            at both ends; ``none``: they lie where the plan wants them.
        kept: backward finds the keys and values that forward has fetched; otherwise it fetches them again, which takes no
            memory.
        apart: of the backward pass, as in :func:`parallel.context.passes.run`.
    """

    pipeline: bool = True
    matched: bool = True
    coalesced: bool = True
    reshuffle: Literal["none", "exposed", "overlapped"] = "overlapped"
    kept: bool = False
    apart: bool = True


ABLATION = {
    "blocks only": System(False, False, False, "exposed"),
    "+ pipeline": System(True, False, False, "exposed"),
    "+ congestion-free rounds": System(True, True, False, "exposed"),
    "+ coalescing": System(True, True, True, "exposed"),
    "+ reshuffle overlapped": System(True, True, True, "overlapped"),
}


def simulate(
    lengths: np.ndarray,
    workers: int,
    kind: str = "fcp",
    shape: AttentionShape | None = None,
    costs: Costs | None = None,
    system: System | None = None,
    block: int = 4096,
    passes: str = "forward",
) -> Result:
    """Simulate one layer of attention over a batch.

    Args:
        lengths: tokens of each document.
        workers: how many.
        kind: of context parallelism; ``zigzag-each``, ``ulysses``, ``magi`` and ``grouping`` are those of
            :mod:`parallel.context.rivals`, ``.magi`` and ``.groups``, the others have plans.
        shape: of the attention.
        costs: of the machine.
        system: of FCP.
        block: tokens of a block.
        passes: ``forward``, ``backward``, or ``both``, one after the other on the same layout.

    Raises:
        ValueError: an unknown kind or passes, ``ulysses`` on workers that do not divide the heads, or what
            :func:`parallel.context.make_plan` refuses.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    shape, costs, ways = shape or AttentionShape(), costs or Costs(), ways_of(passes)
    lengths = np.asarray(lengths)
    if kind in _UNPLANNED:
        outcome = _UNPLANNED[kind](lengths, workers, shape, costs, ways)
        return result_of(float(causal_pairs(lengths).sum()), ways, shape, costs, outcome)
    plan = plan_for(lengths, workers, kind, costs, block)
    return simulate_plan(plan, kind, shape, costs, system, passes)


def plan_for(lengths: np.ndarray, workers: int, kind: str, costs: Costs, block: int = 4096) -> Plan:
    """The plan of a batch on the machine of ``costs``."""
    links = Links(costs.node, 1 / costs.nvlink, 1 / costs.network)
    return make_plan(lengths, PlanConfig(workers, block, kind, links=links))


def simulate_plan(
    plan: Plan,
    kind: str,
    shape: AttentionShape | None = None,
    costs: Costs | None = None,
    system: System | None = None,
    passes: str = "forward",
) -> Result:
    """:func:`simulate` of a plan that is there already; other costs than those that it was made for are fine."""
    shape, costs, system = shape or AttentionShape(), costs or Costs(), system or System()
    ways, fcp = ways_of(passes), kind in ("fcp", "fcp-pairs")
    if not fcp:
        system = System(reshuffle="none")
    spread = spread_of(plan, _step_of_moves(plan, kind, system), whole_runs=not fcp)
    work = work_of(spread)
    outcome = added(
        run(
            spread,
            work,
            way,
            shape,
            costs,
            reshuffle=_reshuffle(plan, way, shape, costs, system.reshuffle),
            pipelined=system.pipeline,
            kept=system.kept,
            apart=system.apart,
        )
        for way in ways
    )
    return result_of(float(plan.blocks.work.sum()), ways, shape, costs, outcome)


def ways_of(passes: str) -> tuple[Pass, ...]:
    """The passes that a name stands for.

    Raises:
        ValueError: an unknown name.
    """
    if passes not in _WAYS:
        raise ValueError(f"passes={passes!r}: must be one of {', '.join(_WAYS)}")
    return _WAYS[passes]


def _step_of_moves(plan: Plan, kind: str, system: System) -> np.ndarray:
    """i64[E]: the step of each transfer; transfers of a step are one grouped call."""
    moves, workers = plan.moves, plan.capacity.workers
    if not len(moves):
        return np.zeros(0, np.int64)
    if kind in ("ring", "zigzag"):
        # All workers' transfers over the same distance are one step, each straight from the keys' owner.
        return np.unique((moves.receiver - moves.sender) % workers, return_inverse=True)[1]
    if system.matched:
        return plan.rounds // plan.capacity.stage_rounds if system.coalesced else plan.rounds
    # Moves are sorted by document and block for each receiver: its first is in step 0.
    order = np.argsort(moves.receiver, kind="stable")
    owner, step = moves.receiver[order], np.zeros(len(moves), np.int64)
    step[order] = np.arange(len(moves)) - np.searchsorted(owner, owner)
    return step


def _reshuffle(plan: Plan, way: Pass, shape: AttentionShape, costs: Costs, mode: str) -> Reshuffle:
    """From equal shares of the batch and back.

    Forward brings queries, keys and values and takes outputs back; backward brings the gradients of outputs and takes those
    of queries, keys and values back, for what forward has brought stays.
    """
    blocks, worker, workers = plan.blocks, plan.placement.worker, plan.capacity.workers
    home = (2 * blocks.start + blocks.length) * workers // (2 * blocks.tokens)
    if mode == "none" or not (home != worker).any():
        return STAY
    crossing = costs.crossing(home, worker)
    cost = np.where(home == worker, 0, blocks.length) / np.where(crossing, costs.network, costs.nvlink)
    # Each way a link carries what leaves a worker and what comes to it at the same time.
    most = float(max(np.bincount(home, cost, workers).max(), np.bincount(worker, cost, workers).max()))
    latency = costs.network_latency if crossing.any() else costs.nvlink_latency
    sizes = shape.query_bytes + shape.kv_bytes, shape.query_bytes
    into, back = sizes if way == "forward" else sizes[::-1]
    first = float(cost.max()) * into + latency
    return Reshuffle(most * into + latency, most * back + latency, first, mode == "overlapped")
