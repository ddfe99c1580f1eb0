"""MagiAttention (SandAI-org/MagiAttention): chunks of the packed batch dealt out for equal area, keys sent where needed.

As in its own benchmark: chunks of 2,048 tokens of the packed batch, whatever documents they hold; equally many on each
worker, the largest area first to whoever has the least (its min-heap dispatch). A worker receives exactly the keys and
values that its queries see, in one or a few grouped calls, stage by stage beside the work on those before; backward
fetches them again and sends gradients home, summed before they leave. In favour of it: for each batch the best number of
stages is taken, and the better of one queue for keys and gradients and two; merging and splitting ranges costs nothing. A
chunk's keys travel once to each worker, also within a node.
"""

import heapq
from dataclasses import replace

import numpy as np

from parallel.context.costs import AttentionShape, Costs, Pass
from parallel.context.outcome import Outcome, added
from parallel.context.passes import run
from parallel.context.rounds import transfers
from parallel.context.work import Spread, runs, work_of

CHUNK = 2048
DEGREES = (1, 2, 3, 4)


def magi(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs, ways: tuple[Pass, ...]
) -> Outcome:
    """The passes in the way that is fastest for them."""
    whole = magi_spread(lengths, workers)
    outcomes: list[Outcome] = []
    for degree in DEGREES:
        spread = replace(whole, step=stages(whole, degree))
        work = work_of(spread)
        outcomes.extend(
            added(run(spread, work, way, shape, costs, apart=apart) for way in ways)
            for apart in ((True, False) if "backward" in ways else (True,))
        )
    return min(outcomes, key=lambda outcome: outcome.seconds)


def magi_spread(lengths: np.ndarray, workers: int, chunk: int = CHUNK) -> Spread:
    """Who holds which part of which document; all keys in one stage.

    Args:
        lengths: tokens of each document.
        workers: how many.
        chunk: tokens.
    """
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    start = np.union1d(ends - lengths, np.arange(0, ends[-1], chunk))
    length = np.diff(np.append(start, ends[-1]))
    document = np.searchsorted(ends, start, side="right")
    position = start - (ends - lengths)[document]
    # Pieces of a document before each one, all of which it sees.
    count = np.arange(len(start)) - np.searchsorted(document, document)
    query = np.repeat(np.arange(len(start)), count)
    key = np.arange(len(query)) - np.repeat(np.cumsum(count) - count, count) + (query - count[query])
    area = length * position + length * (length + 1) // 2
    chunks = start // chunk
    worker = deal(np.bincount(chunks, area), workers)[chunks]
    moves, move = transfers(document, worker, workers, query, key)
    return Spread(
        workers=workers,
        worker=worker,
        length=length,
        chunk=runs(worker, position == 0),
        own=(length * (length + 1) // 2).astype(np.float64),
        area=length.astype(np.float64) ** 2,
        query=query,
        key=key,
        seen=(length[query] * length[key]).astype(np.float64),
        moves=moves,
        move=move,
        step=np.zeros(len(moves), np.int64),
    )


def deal(area: np.ndarray, workers: int) -> np.ndarray:
    """i64[chunks]: a worker for each, the largest first to whoever has the least area and not yet its number of chunks."""
    most = -(-len(area) // workers)
    heap = [(0.0, worker) for worker in range(workers)]
    owner, left = np.zeros(len(area), np.int64), [most] * workers
    for chunk in np.argsort(-area, kind="stable").tolist():
        load, worker = heapq.heappop(heap)
        owner[chunk] = worker
        left[worker] -= 1
        if left[worker]:
            heapq.heappush(heap, (load + float(area[chunk]), worker))
    return owner


def stages(spread: Spread, degree: int) -> np.ndarray:
    """i64[E]: each receiver's transfers in the order of the batch, cut into ``degree`` parts of equally many tokens."""
    receiver, tokens = spread.moves.receiver, spread.length[spread.moves.block]
    order = np.lexsort((np.arange(len(receiver)), receiver))
    before = np.cumsum(tokens[order]) - tokens[order]
    before -= before[np.searchsorted(receiver[order], receiver[order])]
    total = np.bincount(receiver, tokens)[receiver[order]]
    step = np.zeros(len(receiver), np.int64)
    step[order] = (2 * before + tokens[order]) * degree // (2 * total)
    return step
