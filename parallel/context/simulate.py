"""How long a layer of attention takes under each kind of context parallelism, from its real plan and stated costs.

The plans of :mod:`parallel.context.plan` say what every worker computes and receives, round by round;
:mod:`parallel.context.timeline` plays them with the constants of :mod:`parallel.context.costs`. Rings are honest: they skip
what causality and documents mask, in work and in bytes, and overlap what they send with what they compute.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from parallel.context.costs import AttentionShape, Costs
from parallel.context.plan import Plan, PlanConfig, make_plan
from parallel.context.rivals import Outcome, causal_pairs, grouping, ulysses, zigzag_each
from parallel.context.rounds import Links
from parallel.context.timeline import Steps, play

Kind = Literal["fcp", "fcp-pairs", "ring", "zigzag", "zigzag-each", "ulysses", "document", "grouping"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_UNPLANNED = {"zigzag-each": zigzag_each, "ulysses": ulysses, "grouping": grouping}


@dataclass(frozen=True)
class System:
    """What of FCP is switched on; each field is a step of the ablation of arXiv 2605.08524, in its order.

    Attributes:
        pipeline: transfers run beside kernels.
        matched: rounds in which each worker sends and receives at most one block; otherwise it asks for the blocks that
            it needs in the order of documents, whoever else asks for them then.
        coalesced: as many rounds as the plan's stage has are one message and one kernel.
        reshuffle: tokens come in the order of the batch and return to it: ``exposed``, or ``overlapped`` with local work
            at both ends; ``none``: they lie where the plan wants them.
    """

    pipeline: bool = True
    matched: bool = True
    coalesced: bool = True
    reshuffle: Literal["none", "exposed", "overlapped"] = "overlapped"


ABLATION = {
    "blocks only": System(False, False, False, "exposed"),
    "+ pipeline": System(True, False, False, "exposed"),
    "+ congestion-free rounds": System(True, True, False, "exposed"),
    "+ coalescing": System(True, True, True, "exposed"),
    "+ reshuffle overlapped": System(True, True, True, "overlapped"),
}


@dataclass(frozen=True)
class Result:
    """One layer's forward pass; ``mfu`` is the product of the three shares after it.

    Attributes:
        seconds: until the last worker is done.
        mfu: FLOPs that causal attention within documents needs, over the peak of all workers in that time.
        kernel: of the peak while kernels run, in the mean.
        balance: mean over slowest worker's time in kernels.
        overlap: the slowest worker's time in kernels over all time; the rest is waiting.
        received: bytes that a worker receives in the mean.
        tokens: of the fullest worker over the mean.
    """

    seconds: float
    mfu: float
    kernel: float
    balance: float
    overlap: float
    received: float
    tokens: float


@dataclass(frozen=True)
class Work:
    """A plan's work, one entry for each pair of blocks that one worker attends.

    Attributes:
        worker: i64[M].
        step: i64[M], the step that brings the keys; -1 local.
        tokens: f64[M], side of the square whose area is that of the kernel's part that the entry belongs to: a chunk of
            queries against all keys of its document that the step brings.
        pairs: f64[M], (query, key) pairs of tokens.
    """

    worker: np.ndarray
    step: np.ndarray
    tokens: np.ndarray
    pairs: np.ndarray


def simulate(
    lengths: np.ndarray,
    workers: int,
    kind: str = "fcp",
    shape: AttentionShape | None = None,
    costs: Costs | None = None,
    system: System | None = None,
    block: int = 4096,
) -> Result:
    """Simulate one forward pass of attention over a batch.

    Args:
        lengths: tokens of each document.
        workers: how many.
        kind: of context parallelism; ``zigzag-each``, ``ulysses`` and ``grouping`` are those of
            :mod:`parallel.context.rivals`, the others have plans.
        shape: of the attention.
        costs: of the machine.
        system: of FCP.
        block: tokens of a block.

    Raises:
        ValueError: an unknown kind, ``ulysses`` on workers that do not divide the heads, or what
            :func:`parallel.context.make_plan` refuses.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    shape, costs = shape or AttentionShape(), costs or Costs()
    lengths = np.asarray(lengths)
    if kind in _UNPLANNED:
        return _result(lengths, workers, shape, costs, _UNPLANNED[kind](lengths, workers, shape, costs))
    return simulate_plan(plan_for(lengths, workers, kind, costs, block), kind, shape, costs, system)


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
) -> Result:
    """:func:`simulate` of a plan that is there already; other costs than those that it was made for are fine."""
    shape, costs, system = shape or AttentionShape(), costs or Costs(), system or System()
    blocks, workers = plan.blocks, plan.capacity.workers
    if kind not in ("fcp", "fcp-pairs"):
        system = System(reshuffle="none")
    step = _step_of_moves(plan, kind, system)
    work = work_of(plan, step, whole_runs=kind not in ("fcp", "fcp-pairs"))
    seconds = work.pairs * shape.pair_flops / costs.rate(work.tokens, system.pipeline and len(plan.moves) > 0)
    local = np.bincount(work.worker, np.where(work.step < 0, seconds, 0.0), workers)
    steps = _steps(plan, step, work, seconds, shape, costs)
    into, back, first = _reshuffle(plan, shape, costs) if system.reshuffle != "none" else (0.0, 0.0, 0.0)
    links = np.full(workers, into)
    if system.reshuffle == "overlapped" and into + back > 0:
        # Local work runs beside the reshuffle, at both ends as long as each lasts.
        head = local * (into / (into + back))
        done = play(steps, links, np.maximum(into, first + head), system.pipeline, costs.room)
        end = np.maximum(done + back, done + (local - head) + first * back / into)
    else:
        end = play(steps, links, into + local, system.pipeline, costs.room) + back
    held = np.bincount(plan.placement.worker, blocks.length, workers)
    outcome = Outcome(
        float(end.max()),
        np.bincount(work.worker, seconds, workers),
        float(blocks.length[plan.moves.block].sum()) * shape.kv_bytes / workers,
        float(held.max() / held.mean()),
    )
    return _result(np.bincount(blocks.document, blocks.length), workers, shape, costs, outcome)


def _result(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs, outcome: Outcome
) -> Result:
    flops = float(causal_pairs(lengths).sum()) * shape.pair_flops
    compute = outcome.compute
    return Result(
        seconds=outcome.seconds,
        mfu=flops / (workers * costs.peak * outcome.seconds),
        kernel=flops / (costs.peak * float(compute.sum())),
        balance=float(compute.mean() / compute.max()),
        overlap=float(compute.max()) / outcome.seconds,
        received=outcome.received,
        tokens=outcome.tokens,
    )


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


def work_of(plan: Plan, step: np.ndarray, whole_runs: bool) -> Work:
    """Every pair of blocks of a plan, and what each block does with itself.

    Args:
        plan: the plan.
        step: i64[E], of its moves.
        whole_runs: neighbouring blocks of a worker are one chunk to the kernel, as in layouts that are not by blocks.
    """
    blocks, worker, length = plan.blocks, plan.placement.worker, plan.blocks.length.astype(np.float64)
    count, number = blocks.index, np.arange(len(blocks))
    query = np.repeat(number, count)
    key = (
        np.arange(len(query)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(number - count, count)
    )
    brought = np.full(len(query), -1)
    if len(plan.moves):
        sent = plan.moves.receiver * len(blocks) + plan.moves.block
        order = np.argsort(sent)
        wanted = worker[query] * len(blocks) + key
        at = np.minimum(np.searchsorted(sent[order], wanted), len(sent) - 1)
        brought = np.where(sent[order][at] == wanted, step[order][at], -1)
    chunk = number
    if whole_runs:
        chunk = np.cumsum((np.diff(worker, prepend=-1) != 0) | (blocks.index == 0)) - 1
    # The masked half of a chunk's square with itself counts as area: a document alone is a chunk of its length.
    area = length[query] * length[key] * np.where(chunk[query] == chunk[key], 2, 1)
    area, part = np.append(area, length**2), np.append(chunk[query], chunk)
    brought = np.append(brought, np.full(len(blocks), -1))
    kernel = np.unique(part * (brought.max() + 2) + brought + 1, return_inverse=True)[1]
    return Work(
        np.append(worker[query], worker),
        brought,
        np.sqrt(np.bincount(kernel, area))[kernel],
        np.append(length[query] * length[key], length * (length + 1) / 2),
    )


def _steps(
    plan: Plan, step: np.ndarray, work: Work, seconds: np.ndarray, shape: AttentionShape, costs: Costs
) -> Steps:
    moves, workers = plan.moves, plan.capacity.workers
    count = int(step.max()) + 1 if len(moves) else 0
    remote = work.step >= 0
    at = work.worker[remote] * count + work.step[remote]
    unlocked = np.bincount(at, seconds[remote], workers * count).reshape(workers, count)
    crossing = costs.crossing(moves.sender, moves.receiver)
    tokens = plan.blocks.length[moves.block].astype(np.float64)
    return Steps(
        step,
        moves.sender,
        moves.receiver,
        tokens * shape.kv_bytes / np.where(crossing, costs.network, costs.nvlink),
        np.where(crossing, costs.network_latency, costs.nvlink_latency),
        tokens,
        unlocked,
    )


def _reshuffle(plan: Plan, shape: AttentionShape, costs: Costs) -> tuple[float, float, float]:
    """Seconds to bring queries, keys and values from equal shares of the batch, to bring outputs back, of the first block."""
    blocks, worker, workers = plan.blocks, plan.placement.worker, plan.capacity.workers
    home = (2 * blocks.start + blocks.length) * workers // (2 * blocks.tokens)
    crossing = costs.crossing(home, worker)
    cost = np.where(home == worker, 0, blocks.length) / np.where(crossing, costs.network, costs.nvlink)
    if not (home != worker).any():
        return 0.0, 0.0, 0.0
    # Each way a link carries what leaves a worker and what comes to it at the same time.
    most = max(np.bincount(home, cost, workers).max(), np.bincount(worker, cost, workers).max())
    latency = costs.network_latency if crossing.any() else costs.nvlink_latency
    size = shape.query_bytes + shape.kv_bytes
    into, back = float(most) * size + latency, float(most) * shape.query_bytes + latency
    return into, back, float(cost.max()) * size + latency
