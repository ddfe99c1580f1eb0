"""On the host: the rows of a batch planned for the devices that share them, and where every token goes.

Segments of rows are the documents of the plans. Nothing is known here of what tokens carry: :attr:`Placed.source` says
for every place in the slots which token of the batch stands there, and whoever holds a batch takes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import numpy as np

from parallel.context.arrays import Capacity, PlanArrays, rounded
from parallel.context.exchange import BACKENDS, Exchange
from parallel.context.lanes import Lanes, make_lanes
from parallel.context.layout import Layout, layout
from parallel.context.placement import STRATEGIES
from parallel.context.plan import Plan, PlanConfig, make_plan
from parallel.context.scattered import Scattered, of_a_worker
from parallel.context.ulysses import ulysses_plan

SCATTER_STRATEGIES: tuple[str, ...] = (*STRATEGIES, "ulysses")


@dataclass(frozen=True)
class ScatterConfig:
    """How batches are scattered.

    Attributes:
        workers: N, devices that share rows.
        groups: G, of such devices; each has its own rows.
        parts: M, microbatches.
        block: tokens of a block.
        strategy: of :data:`SCATTER_STRATEGIES`.
        backend: of :class:`parallel.context.exchange.Exchange`.
        stage_rounds: rounds of communication that travel at once.
        reach: most inputs that a convolution of the model looks back; None: no layer has a state.
        window: of the model's widest attention, as :class:`parallel.context.plan.PlanConfig` has it.
    """

    workers: int
    groups: int = 1
    parts: int = 1
    block: int = 4096
    strategy: str = "fcp"
    backend: str = "rotate"
    stage_rounds: int = 16
    reach: int | None = 3
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "groups", "parts", "block", "stage_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"scatter {name}={getattr(self, name)!r}: must be at least 1")
        if self.window is not None and self.window < 1:
            raise ValueError(f"scatter window={self.window!r}: must be None or at least 1")
        if self.strategy not in SCATTER_STRATEGIES:
            raise ValueError(
                f"scatter strategy={self.strategy!r}: must be one of {', '.join(SCATTER_STRATEGIES)}"
            )
        if self.backend not in BACKENDS:
            raise ValueError(f"scatter backend={self.backend!r}: must be one of {', '.join(BACKENDS)}")

    @property
    def sharing(self) -> int:
        """Devices that have equal parts of the slots of a worker of the plan."""
        return self.workers if self.strategy == "ulysses" else 1


@dataclass(frozen=True)
class Room:
    """What a program is compiled for; a batch that fits needs no other.

    Attributes:
        capacity: of the plans.
        extra: extra lanes of a device.
    """

    capacity: Capacity
    extra: int = 0

    def enlarged(self, other: "Room") -> "Room":
        """The smallest room that holds the batches of both.

        Raises:
            ValueError: as :meth:`Capacity.enlarged`.
        """
        return Room(self.capacity.enlarged(other.capacity), max(self.extra, other.extra))

    def beyond(self, outgrown: "Room", sharing: int = 1) -> "Room":
        """This one, which ``outgrown`` does not hold, with a margin everywhere; see :class:`Capacity`."""
        capacity = self.capacity.beyond(outgrown.capacity).rounded(sharing)
        return Room(capacity, rounded(self.extra + -(-outgrown.extra // 2), 2))


@dataclass(frozen=True)
class Placed:
    """A scattered batch, NumPy leaves.

    Attributes:
        source: i64[G * N * M * S, block], of the batch's B * T tokens the one that stands there; -1 = padding.
        segment_ids: i32[G * N * M * S, block], documents of a group's microbatch from 1 on; 0 = padding.
        positions: i32[G * N * M * S, block], in the document.
        scattered: what the step takes.
        room: what it is compiled for.
        plans: [G][M], of one group and microbatch each.
    """

    source: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    scattered: Scattered
    room: Room
    plans: list[list[Plan]]


def scatter(segment_ids: np.ndarray, config: ScatterConfig, room: Room | None = None) -> Placed:
    """Plan a batch; a pure function of its arguments, so that every process makes the same of it.

    Args:
        segment_ids: i32[B, T]; documents of each row numbered from 1 on, one after the other; 0 = padding. Group g has the
            g-th of G equal slices of the rows, microbatch m every M-th of them from the m-th on.
        config: devices and strategy.
        room: is kept if it is large enough, and else grows everywhere; None: as much as the batch needs, rounded up.

    Raises:
        ValueError: the rows are not a multiple of groups * parts.
    """
    count, length = segment_ids.shape
    if count % (config.groups * config.parts):
        raise ValueError(
            f"rows={count}: must be a multiple of groups * parts = {config.groups} * {config.parts}"
        )
    rows = np.arange(count).reshape(config.groups, -1, config.parts).swapaxes(1, 2)
    parts = [[_Part.of(segment_ids, own) for own in group] for group in rows]
    plans, capacity = _planned(parts, config, None if room is None else room.capacity)
    places = _each(_places, parts, plans)
    # A plan of one worker has its slots in the order of those who share them.
    shared = plans if config.strategy != "ulysses" else _each(lambda p: _shared(p, config.workers), plans)
    lanes, extra = None, 0
    if config.reach is not None:
        lanes, extra = _lanes(shared, config.reach, 0 if room is None else room.extra)
    made = Room(capacity, extra)
    if room is not None and made != room:
        return scatter(segment_ids, config, made.beyond(room, config.sharing))
    slots = (config.groups * config.workers * config.parts * shared[0][0].capacity.slots, config.block)

    def tokenwise(found: list[list[np.ndarray]]) -> np.ndarray:
        return _by_device(_each(lambda x: x.reshape(config.workers, -1, config.block), found)).reshape(slots)

    heads = config.strategy == "ulysses"
    group_wide = PlanArrays._fields if heads else ("order",)
    scattered = Scattered(
        plan=_stacked(_each(lambda p: _of_one(p.arrays) if heads else p.arrays, plans), group_wide),
        lanes=lanes,
        index=tokenwise(_each(lambda p: p.index, places)),
        ahead=None,
        exchange=Exchange(capacity, "context", config.backend),
        heads=heads,
        rows=rows.shape[2],
        length=length,
    )
    return Placed(
        source=tokenwise(_each(lambda part, p: part.source(p.index), parts, places)),
        segment_ids=tokenwise(_each(lambda p: p.segment_ids, places)),
        positions=tokenwise(_each(lambda p: p.positions, places)),
        scattered=scattered,
        room=made,
        plans=plans,
    )


@dataclass(frozen=True)
class _Part:
    """The rows of a group in one microbatch.

    Attributes:
        rows: i64[r], of the batch.
        length: T.
        tokens: i64[t], places of their documents' tokens among the r * T, in order.
        lengths: i64[d], of the documents.
    """

    rows: np.ndarray
    length: int
    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, segment_ids: np.ndarray, rows: np.ndarray) -> "_Part":
        own = segment_ids[rows]
        opens = own > 0
        opens[:, 1:] &= own[:, 1:] != own[:, :-1]
        tokens, starts = np.flatnonzero(own), np.flatnonzero(opens)
        if not len(tokens):
            # Plans are of at least one document: this one is nowhere, and so padding.
            return cls(rows, own.shape[1], np.array([-1]), np.array([1]))
        lengths = np.diff(np.append(np.searchsorted(tokens, starts), len(tokens)))
        return cls(rows, own.shape[1], tokens, lengths)

    def source(self, index: np.ndarray) -> np.ndarray:
        """Places in the batch of places among the own rows' tokens."""
        row, column = np.divmod(np.maximum(index, 0), self.length)
        return np.where(index < 0, -1, self.rows[row] * self.length + column)


def _each(of: Callable[..., Any], *tables: list[list[Any]]) -> list[list[Any]]:
    """``of`` each group and microbatch."""
    return [[of(*entries) for entries in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def _places(part: _Part, plan: Plan) -> Layout:
    """As :func:`layout`, but the index counts the padding between documents too."""
    index, segment_ids, positions = layout(plan)
    index = np.where(index < 0, -1, part.tokens[index]).astype(np.int32)
    return Layout(index, np.where(index < 0, 0, segment_ids), np.where(index < 0, 0, positions))


def _planned(
    parts: list[list[_Part]], config: ScatterConfig, capacity: Capacity | None
) -> tuple[list[list[Plan]], Capacity]:
    """Plans of one capacity: of ``capacity`` if that holds them, else of a rounded one that holds it too."""

    def planned(part: _Part, at_least: Capacity | None) -> Plan:
        if config.strategy == "ulysses":
            return ulysses_plan(part.lengths, config.workers, config.block, at_least, config.window)
        return make_plan(part.lengths, inner, at_least)

    inner = PlanConfig(
        config.workers,
        config.block,
        "fcp" if config.strategy == "ulysses" else config.strategy,
        stage_rounds=config.stage_rounds,
        rounds="rotations" if config.backend == "rotate" else "matchings",
        window=config.window,
    )
    plans = _each(lambda part: planned(part, capacity), parts)
    common = reduce(Capacity.enlarged, (plan.capacity for group in plans for plan in group))
    if common != capacity:
        common = common.rounded(config.sharing)
    fitting = _each(
        lambda part, plan: plan if plan.capacity == common else planned(part, common), parts, plans
    )
    return fitting, common


def _lanes(plans: list[list[Plan]], reach: int, extra: int) -> tuple[Lanes, int]:
    """Lanes of as many extra ones, stacked."""
    made = _each(lambda plan: make_lanes(plan, reach=reach, extra=extra), plans)
    most = max(lanes.moved.shape[1] for group in made for lanes in group)
    if most > extra:
        most = rounded(most, 2)
    fitting = _each(
        lambda plan, lanes: (
            lanes if lanes.moved.shape[1] == most else make_lanes(plan, reach=reach, extra=most)
        ),
        plans,
        made,
    )
    group_wide = [name for name, own in zip(Lanes._fields, of_a_worker()) if not own]
    return _stacked(fitting, group_wide), most


def _of_one(arrays: PlanArrays) -> PlanArrays:
    """Arrays of a plan for one worker without the axis of workers."""
    return PlanArrays(*(x if n == "order" else x[0] for n, x in zip(PlanArrays._fields, arrays)))


def _shared(plan: Plan, workers: int) -> Plan:
    """A plan for one worker as of ``workers``, each with its share of the slots; as much of it as lanes need."""
    capacity = replace(
        plan.capacity,
        workers=workers,
        slots=plan.capacity.slots // workers,
        shifts=(0,) * (workers - 1) if plan.capacity.shifts else (),
    )
    old, pieces = plan.arrays, plan.capacity.pieces
    column = np.flatnonzero(old.length[0])
    column = column[np.argsort(old.slot[0, column] // capacity.slots, kind="stable")]
    worker, slot = np.divmod(old.slot[0, column], capacity.slots)
    place = np.arange(len(column)) - np.searchsorted(worker, worker)
    number = np.full(pieces + 1, -1, np.int32)
    number[column] = worker * pieces + place
    fields = {}
    for name in ("slot", "offset", "length", "document", "position", "start", "previous"):
        fields[name] = np.full((workers, pieces), 0 if name == "length" else -1, np.int32)
        values = {"slot": slot, "previous": number[old.previous[0, column]]}
        fields[name][worker, place] = values.get(name, getattr(old, name)[0, column])
    order = np.full(workers * pieces, -1, np.int32)
    order[:pieces] = number[old.order]
    return replace(plan, capacity=capacity, arrays=old._replace(**fields, order=order))


def _by_device(table: list[list[np.ndarray]]) -> np.ndarray:
    """[G][M] of [N, ...] to [G * N * M, ...]."""
    stacked = np.stack([np.stack(group, axis=1) for group in table])
    return stacked.reshape(prod(stacked.shape[:3]), *stacked.shape[3:])


def _stacked(table: list[list[Any]], group_wide: Sequence[str]) -> Any:
    """Named tuples by group and microbatch as one, those fields stacked by group that all its workers have."""
    first = table[0][0]

    def field(name: str) -> np.ndarray:
        own = _each(lambda each: getattr(each, name), table)
        return np.stack([x for group in own for x in group]) if name in group_wide else _by_device(own)

    return type(first)(*(field(name) for name in first._fields))
