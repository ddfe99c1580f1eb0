"""The arrays of a plan that layers with a state need: which block goes on from which, in rows that take one state each."""

from typing import NamedTuple

import numpy as np

from parallel.context.plan import Plan


class Lanes(NamedTuple):
    """Rows of the scans, one state entering each; plans of one ``Capacity`` and as many extra lanes have equal shapes.

    A slot may hold the tails of several documents, which go on from as many states. The first of them stays in its slot,
    each other one has an extra lane to itself. So of N workers with S slots each has L = S + X lanes: its slots, less
    what has left them, then the extra ones. -1 fills what a plan does not use. A *place* is worker * S + slot; the blocks
    that another one follows are full, so that a place names them.

    Attributes:
        segment_ids: i32[N, L, block], blocks of a lane from 1 on; 0 = padding. Only block 1 goes on from another place.
        moved: i32[N, X, block], the token of the worker's slots (slot * block + offset) at each token of an extra lane.
        moved_to: i32[N, S, block], the inverse: the token of its extra lanes; i32[N, 0, block] if X = 0.
        order: i32[N * S], places of the blocks that another one follows, document by document.
        first: bool[N * S], those that begin their document.
        after: i32[N, L], the number in ``order`` of the block that a lane's block 1 follows.
        halo: i32[N, L, reach], the tokens before a lane's block 1, as place * block + offset.
        ends: i32[N, L], the document that has its last token at the end of a lane's last block.
    """

    segment_ids: np.ndarray
    moved: np.ndarray
    moved_to: np.ndarray
    order: np.ndarray
    first: np.ndarray
    after: np.ndarray
    halo: np.ndarray
    ends: np.ndarray


def require_counts(**given: int) -> None:
    """Raise ValueError for a number below 0."""
    for name, value in given.items():
        if value < 0:
            raise ValueError(f"lanes {name}={value}: must be at least 0")


def make_lanes(plan: Plan, *, reach: int = 3, extra: int = 0) -> Lanes:
    """The lanes of a plan; a pure function of its arguments.

    Args:
        plan: any strategy's.
        reach: most inputs that a convolution of the model looks back: its width - 1.
        extra: X at least, so that plans share a program.

    Raises:
        ValueError: ``reach`` or ``extra`` below 0.
    """
    require_counts(reach=reach, extra=extra)
    arrays, size = plan.arrays, plan.capacity.block
    workers, slots = plan.capacity.workers, plan.capacity.slots
    held = np.flatnonzero(arrays.length)
    held = held[np.lexsort([field.reshape(-1)[held] for field in (arrays.offset, arrays.slot)])]
    held = held[np.argsort(held // plan.capacity.pieces, kind="stable")]
    worker = held // plan.capacity.pieces
    slot, offset, length, position, previous, document = (
        field.reshape(-1)[held].astype(np.int64)
        for field in (
            arrays.slot,
            arrays.offset,
            arrays.length,
            arrays.position,
            arrays.previous,
            arrays.document,
        )
    )
    leaves = (previous >= 0) & (offset > 0)
    lane = np.where(leaves, slots + _count_within(worker, leaves), slot)
    extra = max(extra, int(lane.max()) - slots + 1)
    segment = 1 + np.where(leaves, 0, _count_within(worker * slots + slot, ~leaves))

    place_of = np.full(arrays.length.size, -1)
    place_of[held] = worker * slots + slot
    followed = np.zeros(arrays.length.size, bool)
    followed[previous[previous >= 0]] = True
    order = np.full(workers * slots, -1, np.int32)
    chain = arrays.order[arrays.order >= 0]
    chain = chain[followed[chain]]
    order[: len(chain)] = place_of[chain]
    first = np.zeros(workers * slots, bool)
    first[: len(chain)] = arrays.position.reshape(-1)[chain] == 0
    number = np.full(arrays.length.size + 1, -1)
    number[chain] = np.arange(len(chain))
    after = np.full((workers, slots + extra), -1, np.int32)
    opens = segment == 1
    after[worker[opens], lane[opens]] = number[previous[opens]]

    ends = np.full((workers, slots + extra), -1, np.int32)
    lengths = np.bincount(document, length).astype(np.int64)
    # In the order of the segments, so that a lane keeps what its last one writes.
    ends[worker, lane] = np.where(position + length == lengths[document], document, -1)
    return Lanes(
        *_tokens(plan, extra, worker, lane, slot, offset, length, segment),
        order,
        first,
        after,
        _halo(order, first, after, reach, size),
        ends,
    )


def _count_within(group: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """How many counted ones of its group, whose members are neighbours, stand before each."""
    before = np.cumsum(counted) - counted
    return before - before[np.searchsorted(group, group)]


def _tokens(
    plan: Plan,
    extra: int,
    worker: np.ndarray,
    lane: np.ndarray,
    slot: np.ndarray,
    offset: np.ndarray,
    length: np.ndarray,
    segment: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``segment_ids``, ``moved`` and ``moved_to``, written block by block."""
    workers, slots, size = plan.capacity.workers, plan.capacity.slots, plan.capacity.block
    segment_ids = np.zeros((workers, slots + extra, size), np.int32)
    moved = np.full((workers, extra, size), -1, np.int32)
    moved_to = np.full((workers, slots if extra else 0, size), -1, np.int32)
    ramp = np.arange(size, dtype=np.int32)
    fields = (worker, lane, slot, offset, length, segment)
    for w, row, s, begin, tokens, number in zip(*(field.tolist() for field in fields)):
        if row < slots:
            segment_ids[w, row, begin : begin + tokens] = number
        else:
            segment_ids[w, row, :tokens] = number
            moved[w, row - slots, :tokens] = ramp[:tokens] + (s * size + begin)
            moved_to[w, s, begin : begin + tokens] = ramp[:tokens] + (row - slots) * size
    return segment_ids, moved, moved_to


def _halo(order: np.ndarray, first: np.ndarray, after: np.ndarray, reach: int, size: int) -> np.ndarray:
    """The tokens before each lane, block by block backwards, for a block may be shorter than the reach."""
    back = np.arange(reach, 0, -1)
    # 0: the block before the lane, 1: the one before that.
    steps, offset = (back - 1) // size, size - 1 - (back - 1) % size
    starts = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
    number = after[..., None] - steps
    inside = (after[..., None] >= 0) & (number >= starts[after][..., None])
    return np.where(inside, order[np.maximum(number, 0)] * size + offset, -1).astype(np.int32)
