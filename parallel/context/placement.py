"""Which worker holds which block: FCP's balanced placement and the layouts it is compared with."""

import heapq
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from parallel.context.balance import Units, equalise, fill, refine, search
from parallel.context.blocks import Blocks, pack

Strategy = Literal["fcp", "fcp-pairs", "ring", "zigzag", "document"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Placement:
    """Where the blocks are.

    Attributes:
        workers: how many.
        worker: i64[K], the owner of each block.
        group: i64[K]; blocks of one group share a slot of the block's size.
        largest: work of the largest thing placed as one, in (query, key) pairs; no placement of them does better.
    """

    workers: int
    worker: np.ndarray
    group: np.ndarray
    largest: float


def check_strategy(strategy: str) -> None:
    """Raise ValueError for a name that is not in ``STRATEGIES``."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: must be one of {', '.join(STRATEGIES)}")


def place(blocks: Blocks, workers: int, strategy: str = "fcp", tolerance: float = 0.01) -> Placement:
    """Give every block a worker.

    Args:
        blocks: what to place.
        workers: how many.
        strategy: ``fcp`` balances single blocks; ``fcp-pairs`` zig-zag pairs, for less traffic at the busiest sender,
            of which it splits those that memory or balance cannot do with;
            ``ring`` gives each worker a contiguous share of the packed tokens, ``zigzag`` two opposite shares of 2N;
            ``document`` cuts only documents that exceed a worker's share.
        tolerance: of the balance of work, for the first two.

    Raises:
        ValueError: ``workers`` below 1 or an unknown strategy.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: must be at least 1")
    check_strategy(strategy)
    if strategy in ("fcp", "fcp-pairs"):
        return _balanced(blocks, workers, strategy == "fcp-pairs", tolerance)
    if strategy == "document":
        worker = _documents(blocks, workers)
    else:
        shares = workers if strategy == "ring" else 2 * workers
        middle = 2 * blocks.start + blocks.length
        share = middle * shares // (2 * blocks.tokens)
        worker = np.minimum(share, shares - 1 - share) if strategy == "zigzag" else share
    group = pack(blocks.length, blocks.size, worker)
    return Placement(workers, worker, group, float(blocks.work.max()))


def _balanced(blocks: Blocks, workers: int, pairs: bool, tolerance: float) -> Placement:
    """FCP (arXiv 2605.08524): blocks of long and short documents for equal tokens and equal attention work.

    Documents' short blocks are packed into slots first: their keys are needed by no other block, so that a slot costs
    no transfer but those of the tails in it.
    """
    slot = pack(blocks.length, blocks.size)
    slots = int(slot.max()) + 1
    tokens = np.bincount(slot, blocks.length, slots).astype(np.int64)
    work = np.bincount(slot, blocks.work, slots)
    unit = _zigzag_units(blocks, slot, slots)
    count = int(unit.max()) + 1
    units = Units(
        np.bincount(unit, tokens, count).astype(np.int64),
        np.bincount(unit, work, count),
        np.bincount(unit, minlength=count) > 1,
    )
    # Pairs of a document have equal work, so that even single blocks start from them: balanced and local at once.
    owner = fill(units, workers)[unit]
    owner = equalise(tokens, work, owner, workers, blocks.size)
    largest = float(work.max())
    if pairs:
        # What memory has split stays split; the others are exchanged as pairs, and split only where that is not enough.
        together = np.unique(unit * workers + owner, return_inverse=True)[1]
        unit_work = np.bincount(together, work)
        unit_tokens = np.bincount(together, tokens).astype(np.int64)
        unit_owner = np.zeros(len(unit_work), np.int64)
        unit_owner[together] = owner
        largest = float(unit_work.max())
        goal = max(work.sum() / workers, largest) * (1 + tolerance)
        unit_slots = np.bincount(together)
        owner = refine(
            unit_tokens, unit_work, unit_slots, unit_owner, workers, blocks.size, goal, by_twos=False
        )[together]
    goal = max(work.sum() / workers, largest) * (1 + tolerance)
    owner = search(tokens, work, owner, workers, blocks.size, goal)
    return Placement(workers, owner[slot], slot, largest)


def _zigzag_units(blocks: Blocks, slot: np.ndarray, slots: int) -> np.ndarray:
    """i64[slots]: block u of a document's m full ones and block m - 1 - u are one unit, as is every other slot."""
    full = np.flatnonzero(blocks.length == blocks.size)
    document, index = blocks.document[full], blocks.index[full]
    of = np.bincount(document, minlength=int(blocks.document.max()) + 1)[document]
    folded = np.minimum(index, of - 1 - index)
    width = int(of.max()) if len(of) else 1
    key = -1 - np.arange(slots, dtype=np.int64)
    key[slot[full]] = document * width + folded
    return np.unique(key, return_inverse=True)[1]


def _documents(blocks: Blocks, workers: int) -> np.ndarray:
    """i64[K]: documents whole where they fit into a worker's share, longest first, the others over as few as hold them."""
    lengths = np.bincount(blocks.document, blocks.length).astype(np.int64)
    first = np.searchsorted(blocks.document, np.arange(len(lengths)))
    share = blocks.tokens / workers
    heap = [(0, worker) for worker in range(workers)]
    owner = np.zeros(len(blocks), np.int64)
    for document in np.argsort(-lengths, kind="stable").tolist():
        group = min(workers, int(np.ceil(lengths[document] / share)))
        chosen = [heapq.heappop(heap) for _ in range(group)]
        count = -(-int(lengths[document]) // blocks.size)
        part = np.arange(count) * 2 * group // count
        owners = np.asarray([worker for _, worker in chosen])[np.minimum(part, 2 * group - 1 - part)]
        at = slice(int(first[document]), int(first[document]) + count)
        owner[at] = owners
        for held, worker in chosen:
            more = int(blocks.length[at][owners == worker].sum())
            heapq.heappush(heap, (held + more, worker))
    return owner
