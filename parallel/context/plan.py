"""A plan of context parallelism: where blocks lie, which travel when, and what each worker computes.

FCP (arXiv 2605.08524) makes a new plan for every batch. Its arrays are inputs of one compiled program, which therefore
knows only their shapes: a :class:`Capacity`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from parallel.context.arrays import (
    Capacity,
    PlanArrays,
    Seats,
    block_arrays,
    round_arrays,
    seats_of,
    work_arrays,
)
from parallel.context.blocks import Blocks, cut
from parallel.context.placement import Placement, check_strategy, place
from parallel.context.rounds import ROUNDS, Links, Transfers, round_costs, schedule, transfers


@dataclass(frozen=True)
class PlanConfig:
    """What a plan is made for.

    Attributes:
        workers: devices that share the batch.
        block: tokens of a block.
        strategy: see :func:`parallel.context.placement.place`.
        tolerance: of the balance of work.
        links: what transfers inside and between nodes take.
        stage_rounds: rounds that are executed as one stage.
        rounds: ``matchings``, as few rounds as possible, or ``rotations``, rounds of one shift from sender to receiver,
            whose permutations a program knows when it is compiled.
        window: of the model's widest attention, where none is full: blocks of keys that no query sees through it are neither
            computed nor sent. None: full attention, which a program with any window may run too.
    """

    workers: int
    block: int = 4096
    strategy: str = "fcp"
    tolerance: float = 0.01
    links: Links = field(default_factory=Links)
    stage_rounds: int = 16
    rounds: str = "matchings"
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "block", "stage_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan {name}={getattr(self, name)!r}: must be at least 1")
        check_strategy(self.strategy)
        if self.rounds not in ROUNDS:
            raise ValueError(f"plan rounds={self.rounds!r}: must be one of {', '.join(ROUNDS)}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"plan window={self.window!r}: must be None or at least 1")
        if self.tolerance < 0:
            raise ValueError(f"plan tolerance={self.tolerance!r}: must be at least 0")


@dataclass(frozen=True)
class Balance:
    """How good a plan is.

    Attributes:
        work: work of the busiest worker over its due, which is the mean, or the largest unit where that is more.
        work_over_mean: the same over the mean.
        tokens: largest distance of a worker's tokens from the mean, in blocks.
        padding: share of all slots' tokens that are none.
        degree: blocks that the busiest worker sends or receives.
        rounds: of communication.
        transfers: blocks that travel.
        received: mean blocks that a worker receives.
        crossing: share of transfers between nodes.
        cost: time of all rounds, in the unit of the links.
        pairs: (query block, key block) pairs that are computed.
    """

    work: float
    work_over_mean: float
    tokens: float
    padding: float
    degree: int
    rounds: int
    transfers: int
    received: float
    crossing: float
    cost: float
    pairs: int


@dataclass(frozen=True)
class Plan:
    """A batch's plan; ``arrays`` is for the device, the rest for the host.

    Attributes:
        capacity: shapes of ``arrays``.
        arrays: the plan.
        blocks: what was placed.
        placement: where.
        moves: what travels.
        rounds: i64[E], when.
        balance: how good the plan is.
    """

    capacity: Capacity
    arrays: PlanArrays
    blocks: Blocks
    placement: Placement
    moves: Transfers
    rounds: np.ndarray
    balance: Balance


def make_plan(
    lengths: Sequence[int] | np.ndarray, config: PlanConfig, at_least: Capacity | None = None
) -> Plan:
    """Plan a batch; a pure function of its arguments, so that every process makes the same one.

    Args:
        lengths: tokens of each document.
        config: workers, block, strategy.
        at_least: a capacity to keep if it is enough, so that the program need not be compiled again.

    Raises:
        ValueError: lengths that are not whole numbers of at least 1 or of 2^31 tokens together, or a
            capacity of other workers, blocks or window.
    """
    blocks = cut(lengths, config.block, config.window)
    if blocks.tokens >= 2**31:
        raise ValueError(
            f"lengths of {blocks.tokens:,} tokens together: must be under 2^31, which indices can hold"
        )
    placement = place(blocks, config.workers, config.strategy, config.tolerance)
    query, key = blocks.pairs()
    moves, move = transfers(blocks.document, placement.worker, config.workers, query, key)
    seats = seats_of(blocks, placement)
    remote = move >= 0
    unlocked = np.bincount(move[remote], blocks.length[query[remote]], len(moves))
    shifts, rounds = (), np.zeros(0, np.int64)
    if config.rounds == "rotations":
        shifts = tuple(int(count) for count in moves.shifts(config.workers))
    else:
        rounds = moves.unlocked_first(schedule(moves, config.workers, config.links), unlocked)
    used = sum(shifts) if shifts else moves.degree(config.workers)
    capacity = _capacity(config, placement, seats, shifts, used, query)
    if at_least is None:
        capacity = _bucketed(capacity)
    elif capacity.enlarged(at_least) != at_least:
        capacity = _bucketed(capacity).enlarged(at_least)
    else:
        capacity = at_least
    if config.rounds == "rotations":
        rounds = moves.rotations(config.workers, capacity.shifts, unlocked)
    source = np.append(rounds, -1)[move]
    arrays = PlanArrays(
        **block_arrays(capacity, blocks, placement, seats),
        **round_arrays(capacity, blocks, moves, rounds, seats),
        **work_arrays(capacity, blocks, placement, seats, query, key, source),
    )
    balance = _balance(config, capacity, blocks, placement, moves, rounds, len(query) + len(blocks))
    return Plan(capacity, arrays, blocks, placement, moves, rounds, balance)


def _bucket(need: int) -> int:
    """The next power of 1.25: few sizes, little waste; nothing stays nothing."""
    size = 1.0
    while int(size) < need:
        size *= 1.25
    return int(size) if need else 0


def _capacity(
    config: PlanConfig,
    placement: Placement,
    seats: Seats,
    shifts: tuple[int, ...],
    used: int,
    query: np.ndarray,
) -> Capacity:
    """What the plan needs and no more."""
    workers = config.workers
    per_worker = np.bincount(placement.worker[query], minlength=workers)
    filled = np.zeros(workers, np.int64)
    np.maximum.at(filled, placement.worker, seats.slot + 1)
    return Capacity(
        workers=workers,
        block=config.block,
        slots=int(filled.max()),
        pieces=int(seats.column.max()) + 1,
        stages=-(-used // config.stage_rounds),
        stage_rounds=config.stage_rounds,
        work=int((per_worker + filled).max()),
        shifts=shifts,
        window=config.window,
    )


def _bucketed(need: Capacity) -> Capacity:
    """Of few sizes; slots are memory and time of every layer, so they are not rounded up."""
    shifts = tuple(_bucket(count) for count in need.shifts)
    # Numbers of rounds by shift are rounded up already.
    stages = -(-sum(shifts) // need.stage_rounds) if shifts else _bucket(need.stages)
    more = {"pieces": _bucket(need.pieces), "work": _bucket(need.work)}
    return replace(need, stages=stages, shifts=shifts, **more)


def _balance(
    config: PlanConfig,
    capacity: Capacity,
    blocks: Blocks,
    placement: Placement,
    moves: Transfers,
    rounds: np.ndarray,
    pairs: int,
) -> Balance:
    workers = config.workers
    work = np.bincount(placement.worker, blocks.work, workers)
    held = np.bincount(placement.worker, blocks.length, workers)
    costs = round_costs(moves, rounds, config.links)
    crossing = config.links.crossing(moves)
    return Balance(
        work=float(work.max() / max(work.mean(), placement.largest)),
        work_over_mean=float(work.max() / work.mean()),
        tokens=float(np.abs(held - held.mean()).max() / blocks.size),
        padding=1 - blocks.tokens / (workers * capacity.slots * capacity.block),
        degree=moves.degree(workers),
        rounds=int((costs > 0).sum()),
        transfers=len(moves),
        received=len(moves) / workers,
        crossing=float(crossing.mean()) if len(moves) else 0.0,
        cost=float(costs.sum()),
        pairs=pairs,
    )
