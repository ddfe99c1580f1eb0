"""The arrays of a plan: what a compiled program reads, and the shapes that it is compiled for."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from parallel.context.blocks import Blocks
from parallel.context.placement import Placement
from parallel.context.rounds import Transfers

# Kinds of work: every key is visible; keys of the query's document are; keys of its document up to its position are. A
# window hides more of each.
FULL, SEGMENT, DIAGONAL = range(3)


@dataclass(frozen=True)
class Capacity:
    """Shapes of a plan's arrays; plans of equal capacity run in the same compiled program.

    Attributes:
        workers: N.
        block: tokens of a slot.
        slots: S, slots of a worker.
        pieces: P, blocks of a worker; short ones share slots.
        stages: stages of communication.
        stage_rounds: rounds of each; a worker has as many slots for what it receives.
        work: W, entries of a worker's list of work.
        shifts: how many rounds bring blocks from worker w to worker w + k, for k = 1 to N - 1; rounds stand in the order
            of k. (): a round may bring a block from any worker to any other.
        window: of attention at most; None: any.
    """

    workers: int
    block: int
    slots: int
    pieces: int
    stages: int
    stage_rounds: int
    work: int
    shifts: tuple[int, ...] = ()
    window: int | None = None

    def __post_init__(self) -> None:
        if len(self.shifts) not in (0, self.workers - 1):
            raise ValueError(f"capacity shifts={self.shifts}: must be {self.workers - 1} numbers, or none")
        if sum(self.shifts) > self.rounds:
            raise ValueError(f"capacity shifts={self.shifts}: must be at most {self.rounds} rounds together")

    @property
    def rounds(self) -> int:
        """R, rounds of all stages."""
        return self.stages * self.stage_rounds

    @property
    def shift_of_round(self) -> tuple[int, ...]:
        """The shift of each of R rounds, 0 where none is due; only of a capacity with ``shifts``."""
        used = tuple(k for k, count in enumerate(self.shifts, 1) for _ in range(count))
        return used + (0,) * (self.rounds - len(used))

    def enlarged(self, other: "Capacity") -> "Capacity":
        """The smallest capacity that holds the plans of both.

        Raises:
            ValueError: they differ in workers, block, stage_rounds, window or the number of shifts.
        """
        for name in ("workers", "block", "stage_rounds", "window"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"capacity {name}={getattr(other, name)}: must be the plan's {getattr(self, name)}"
                )
        if len(self.shifts) != len(other.shifts):
            raise ValueError(
                f"capacity shifts={other.shifts}: must be {len(self.shifts)} numbers, as the plan's rounds want"
            )
        sizes = ("slots", "pieces", "stages", "work")
        more: dict[str, Any] = {name: max(getattr(self, name), getattr(other, name)) for name in sizes}
        more["shifts"] = tuple(map(max, self.shifts, other.shifts))
        more["stages"] = max(more["stages"], -(-sum(more["shifts"]) // self.stage_rounds))
        return replace(self, **more)

    def beyond(self, outgrown: "Capacity") -> "Capacity":
        """This one, which ``outgrown`` does not hold, with half of that on top of every size, and of slots with one.

        All sizes grow, not the one that was outgrown alone: each is the largest of some batches, and if they grew one by one
        each would want a program of its own.
        """

        def more(new: int, old: int) -> int:
            return new + -(-old // 2)

        shifts = tuple(map(more, self.shifts, outgrown.shifts))
        return replace(
            self,
            slots=max(self.slots, outgrown.slots + 1),
            pieces=more(self.pieces, outgrown.pieces),
            stages=max(more(self.stages, outgrown.stages), -(-sum(shifts) // self.stage_rounds)),
            work=more(self.work, outgrown.work),
            shifts=shifts,
        )

    def rounded(self, sharing: int = 1) -> "Capacity":
        """One of few capacities, which holds what this one does: other batches seldom outgrow it.

        Slots are memory and time of every layer, and become at most an eighth more; the others at most a half.

        Args:
            sharing: devices that have equal parts of a worker's slots.
        """
        shifts = tuple(rounded(count, 2) for count in self.shifts)
        return replace(
            self,
            slots=rounded(-(-self.slots // sharing), 4) * sharing,
            pieces=rounded(self.pieces, 2),
            stages=max(rounded(self.stages, 2), -(-sum(shifts) // self.stage_rounds)),
            work=rounded(self.work, 2),
            shifts=shifts,
        )


def rounded(need: int, bits: int) -> int:
    """The least whole number from ``need`` on that has only zeros behind its first ``bits`` bits."""
    low = max(0, need.bit_length() - bits)
    return -(-need >> low) << low


class PlanArrays(NamedTuple):
    """What the compiled program reads; -1 fills what a plan does not use, but for ``length`` and ``work_start``.

    NumPy's on the host, JAX's in a program. Leading axes are workers, except in ``order``. Keys and values of a worker are addressed by one number: slot s as s,
    and what round r brings as S + r % stage_rounds, until the next stage overwrites it.

    Attributes:
        slot: i32[N, P], the slot of each block of a worker.
        offset: i32[N, P], its first token there. Documents' tails come first in a slot.
        length: i32[N, P], its tokens; 0 where there is none.
        document: i32[N, P].
        position: i32[N, P], its first token in the document.
        start: i32[N, P], its first token in the concatenation of all documents.
        previous: i32[N, P], the block before it in its document, as worker * P + column; -1 at a document's begin.
        order: i32[N * P], all blocks in the order of documents, as worker * P + column.
        send_slot: i32[N, R], the slot that a worker sends in a round.
        send_to: i32[N, R].
        send_row: i32[N, R], the place of what is sent among all that its receiver gets in that stage, these in the order
            of senders, then of rounds.
        receive_from: i32[N, R].
        receive_slot: i32[N, R], the sender's slot.
        receive_row: i32[N, R], the place of what comes among all that its sender sends in that stage, these in the order
            of receivers, then of rounds.
        receive_document: i32[N, R], whose block comes; only full ones travel.
        receive_position: i32[N, R], its first token in the document.
        work: i32[N, W, 3], (query slot, number of the keys, kind), by stage, then query slot.
        work_start: i32[N, stages + 2]: entries [t] to [t + 1] need what stages up to t have brought, t = 0 nothing.
    """

    slot: Any
    offset: Any
    length: Any
    document: Any
    position: Any
    start: Any
    previous: Any
    order: Any
    send_slot: Any
    send_to: Any
    send_row: Any
    receive_from: Any
    receive_slot: Any
    receive_row: Any
    receive_document: Any
    receive_position: Any
    work: Any
    work_start: Any


@dataclass(frozen=True)
class Seats:
    """Where in its worker each block sits.

    Attributes:
        slot: i64[K].
        offset: i64[K], its first token in the slot.
        column: i64[K], its number among the worker's blocks.
    """

    slot: np.ndarray
    offset: np.ndarray
    column: np.ndarray


def seats_of(blocks: Blocks, placement: Placement) -> Seats:
    """Slots in the order of the placement's groups; in a slot documents' tails first, whole documents after them."""
    worker, group = placement.worker, placement.group
    key, at = np.unique(worker * (group.max() + 1) + group, return_inverse=True)
    owner = key // (group.max() + 1)
    slot = (np.arange(len(key)) - np.searchsorted(owner, owner))[at]
    order = np.lexsort((np.arange(len(blocks)), blocks.index == 0, slot, worker))
    length, seat = blocks.length[order], at[order]
    before = np.cumsum(length) - length
    offset, column = np.zeros_like(slot), np.zeros_like(slot)
    offset[order] = before - before[np.searchsorted(seat, seat)]
    column[order] = np.arange(len(order)) - np.searchsorted(worker[order], worker[order])
    return Seats(slot, offset, column)


def block_arrays(
    capacity: Capacity, blocks: Blocks, placement: Placement, seats: Seats
) -> dict[str, np.ndarray]:
    """Fields ``slot`` to ``order`` of :class:`PlanArrays`."""
    shape = (capacity.workers, capacity.pieces)
    place_of = placement.worker * capacity.pieces + seats.column
    previous = np.where(blocks.index > 0, np.roll(place_of, 1), -1)
    values = {
        "slot": seats.slot,
        "offset": seats.offset,
        "length": blocks.length,
        "document": blocks.document,
        "position": blocks.index * blocks.size,
        "start": blocks.start,
        "previous": previous,
    }
    made = {}
    for name, value in values.items():
        filled = np.full(shape, 0 if name == "length" else -1, np.int32)
        filled.reshape(-1)[place_of] = value
        made[name] = filled
    made["order"] = np.full(capacity.workers * capacity.pieces, -1, np.int32)
    made["order"][: len(blocks)] = place_of
    return made


def round_arrays(
    capacity: Capacity, blocks: Blocks, moves: Transfers, rounds: np.ndarray, seats: Seats
) -> dict[str, np.ndarray]:
    """Fields ``send_slot`` to ``receive_position``."""
    stage = rounds // capacity.stage_rounds
    slot, block = seats.slot[moves.block], moves.block
    sent = {
        "send_slot": slot,
        "send_to": moves.receiver,
        "send_row": _place_in(stage * capacity.workers + moves.receiver, moves.sender, rounds),
    }
    received = {
        "receive_from": moves.sender,
        "receive_slot": slot,
        "receive_row": _place_in(stage * capacity.workers + moves.sender, moves.receiver, rounds),
        "receive_document": blocks.document[block],
        "receive_position": blocks.index[block] * blocks.size,
    }
    made = {}
    for worker, columns in ((moves.sender, sent), (moves.receiver, received)):
        for name, value in columns.items():
            made[name] = np.full((capacity.workers, capacity.rounds), -1, np.int32)
            made[name][worker, rounds] = value
    return made


def _place_in(group: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Each entry's number within its group, entries in the order of the keys, the first one first."""
    order = np.lexsort((*reversed(keys), group))
    place = np.zeros_like(group)
    place[order] = np.arange(len(group)) - np.searchsorted(group[order], group[order])
    return place


def work_arrays(
    capacity: Capacity,
    blocks: Blocks,
    placement: Placement,
    seats: Seats,
    query: np.ndarray,
    key: np.ndarray,
    source: np.ndarray,
) -> dict[str, np.ndarray]:
    """Fields ``work`` and ``work_start``, of pairs (query block, key block) and the rounds that bring the keys."""
    slots, group = capacity.slots, capacity.stage_rounds
    local = source < 0
    held = np.unique(placement.worker * slots + seats.slot)
    # The blocks of a slot share one entry for what each does with itself.
    worker = np.concatenate([placement.worker[query], held // slots])
    row = np.concatenate([seats.slot[query], held % slots])
    keys = np.concatenate([np.where(local, seats.slot[key], slots + source % group), held % slots])
    stage = np.concatenate([np.where(local, 0, 1 + source // group), np.zeros(len(held), np.int64)])
    kind = np.where(blocks.length[query] == blocks.size, FULL, SEGMENT)
    kind = np.concatenate([kind, np.full(len(held), DIAGONAL)])
    stages = capacity.stages + 1
    bin_of = worker * stages + stage
    order = np.argsort((bin_of * slots + row) * (slots + group) + keys)
    counts = np.bincount(bin_of, minlength=capacity.workers * stages).reshape(capacity.workers, stages)
    work_start = np.zeros((capacity.workers, stages + 1), np.int32)
    work_start[:, 1:] = np.cumsum(counts, axis=1)
    first = np.cumsum(counts.sum(1)) - counts.sum(1)
    work = np.full((capacity.workers, capacity.work, 3), -1, np.int32)
    owner = worker[order]
    work[owner, np.arange(len(order)) - first[owner]] = np.stack([row, keys, kind], 1)[order]
    return {"work": work, "work_start": work_start}
