"""What workers of a simulation compute and send: pieces of documents where a plan or a rival has put them."""

from dataclasses import dataclass

import numpy as np

from parallel.context.plan import Plan
from parallel.context.rounds import Transfers, transfers


@dataclass(frozen=True)
class Spread:
    """Pieces of documents on workers, who sees whom, and when keys travel.

    Attributes:
        workers: how many.
        worker: i64[K], the owner of each piece, in the order of the packed tokens.
        length: i64[K], tokens of each.
        chunk: i64[K]; pieces of one chunk are one to the kernel: a block, or neighbours where layouts are not by blocks.
        own: f64[K], (query, key) pairs of tokens within each piece.
        area: f64[K], the same, with what is masked in the kernel's square.
        query: i64[M], of all pairs of a piece of queries and an earlier piece of keys.
        key: i64[M].
        seen: f64[M], pairs of tokens of each.
        moves: what travels.
        move: i64[M], which of them brings the keys, -1: they are local.
        step: i64[E], when; transfers of one step are one grouped call.
    """

    workers: int
    worker: np.ndarray
    length: np.ndarray
    chunk: np.ndarray
    own: np.ndarray
    area: np.ndarray
    query: np.ndarray
    key: np.ndarray
    seen: np.ndarray
    moves: Transfers
    move: np.ndarray
    step: np.ndarray

    @property
    def steps(self) -> int:
        """Of communication."""
        return int(self.step.max()) + 1 if len(self.step) else 0


@dataclass(frozen=True)
class Work:
    """One entry for each pair of pieces that one worker attends, the pieces with themselves among them.

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


def spread_of(plan: Plan, step: np.ndarray, whole_runs: bool) -> Spread:
    """A plan's spread.

    Args:
        plan: the plan.
        step: i64[E], of its moves.
        whole_runs: neighbouring blocks of a worker are one chunk to the kernel.
    """
    blocks, worker = plan.blocks, plan.placement.worker
    query, key = blocks.pairs()
    moves, move = transfers(blocks.document, worker, plan.capacity.workers, query, key)
    length = blocks.length.astype(np.float64)
    most = length if blocks.window is None else np.minimum(length, blocks.window)
    return Spread(
        workers=plan.capacity.workers,
        worker=worker,
        length=blocks.length,
        chunk=runs(worker, blocks.index == 0) if whole_runs else np.arange(len(blocks)),
        own=blocks.own.astype(np.float64),
        area=length * most,
        query=query,
        key=key,
        seen=blocks.seen(query, key).astype(np.float64),
        moves=moves,
        move=move,
        step=step,
    )


def runs(worker: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """i64[K]: neighbouring pieces of a worker and of a document, numbered; ``begins``: bool, of documents."""
    return np.cumsum((np.diff(worker, prepend=-1) != 0) | begins) - 1


def work_of(spread: Spread) -> Work:
    """Every pair of pieces, and what each piece does with itself."""
    query, key, chunk = spread.query, spread.key, spread.chunk
    brought = np.append(spread.step, -1)[spread.move]
    # The masked half of a chunk's square with itself counts as area: a document alone is a chunk of its length.
    area = np.append(spread.seen * np.where(chunk[query] == chunk[key], 2, 1), spread.area)
    part, brought = np.append(chunk[query], chunk), np.append(brought, np.full(len(chunk), -1))
    kernel = np.unique(part * (brought.max() + 2) + brought + 1, return_inverse=True)[1]
    return Work(
        np.append(spread.worker[query], spread.worker),
        brought,
        np.sqrt(np.bincount(kernel, area))[kernel],
        np.append(spread.seen, spread.own),
    )
