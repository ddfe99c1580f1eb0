"""Context parallelism in groups of workers, chosen for the batch, each of which has some documents to itself."""

import math

import numpy as np

from parallel.context.blocks import pack
from parallel.context.costs import AttentionShape, Costs, Pass
from parallel.context.outcome import Outcome, added
from parallel.context.rivals import chunked_ring, ring_bytes, shared_heads

_GRAIN = 1_000_000
_HALVINGS = 11


def grouping(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs, ways: tuple[Pass, ...]
) -> Outcome:
    """Groups of 1, 2, 4, ... workers, as many of each as suit the batch, after FlexSP (arXiv 2412.01523).

    Each document goes to the smallest groups that finish it in the time that all are given; a group takes its documents
    one after the other, each as :func:`chunked_ring` or :func:`shared_heads`, whichever is faster. The least time is
    found by bisection. A worker holds at most ``costs.crowding`` times its share of tokens. In favour of it: regrouping
    costs nothing, and groups are as good as they come, for all passes together.
    """
    lengths = np.asarray(lengths, np.float64)
    sizes = [2**k for k in range(int(math.log2(workers)) + 1)]
    # f64[sizes, ways, documents] each.
    seconds, compute, received = (
        np.stack(rows) for rows in zip(*(_in_group(lengths, size, shape, costs, ways) for size in sizes))
    )
    kind, group, made = _chosen(lengths, workers, sizes, seconds.sum(1), costs.crowding)
    held = [
        np.bincount(group[kind == index], lengths[kind == index], made[index]) / size
        for index, size in enumerate(sizes)
    ]
    tokens = float(np.concatenate(held).max() / (lengths.sum() / workers))
    outcomes = []
    for number in range(len(ways)):
        each, work, bytes_received = [], [], 0.0
        for index, size in enumerate(sizes):
            own, at = kind == index, (index, number, kind == index)
            each.append(np.bincount(group[own], seconds[at], made[index]))
            work.append(np.repeat(np.bincount(group[own], compute[at], made[index]), size))
            bytes_received += float(received[at].sum()) * size
        busy = np.concatenate(work)
        idle = np.zeros(workers - len(busy))
        slowest = float(np.concatenate(each).max())
        outcomes.append(Outcome(slowest, np.concatenate([busy, idle]), bytes_received / workers, tokens))
    return added(outcomes)


def _chosen(
    lengths: np.ndarray, workers: int, sizes: list[int], seconds: np.ndarray, crowding: float
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Of each document the index of its size and its group, and how many groups of each size; ``seconds``: [sizes, documents]."""
    filling = lengths / (np.asarray(sizes)[:, None] * crowding * lengths.sum() / workers)
    # All documents in one group of the largest size: nothing spreads tokens further.
    filling[-1] = 0

    def groups(limit: float) -> tuple[np.ndarray, np.ndarray, list[int]] | None:
        """Those that end within the limit. None: too many."""
        for least in range(len(sizes)):
            fits = (filling <= 1) & (seconds <= limit)
            fits[:least] = False
            kind = fits.argmax(0)
            at = kind, np.arange(len(lengths))
            # Of a group's time, or of its memory where a document takes more of that.
            part = np.maximum(seconds[at] / limit, filling[at])
            if not fits.any(0).all() or (part * np.take(sizes, kind)).sum() > workers:
                continue
            group, made = np.zeros(len(lengths), np.int64), []
            for index in range(len(sizes)):
                own = np.flatnonzero(kind == index)
                if len(own):
                    group[own] = pack(
                        np.minimum(np.ceil(part[own] * _GRAIN), _GRAIN).astype(np.int64), _GRAIN
                    )
                made.append(int(group[own].max()) + 1 if len(own) else 0)
            if np.dot(sizes, made) <= workers:
                return kind, group, made
        return None

    # That is always possible; the margin is for times rounded up to grains.
    high = float(seconds[-1].sum()) * (1 + 2 * len(lengths) / _GRAIN)
    low = float(seconds.min(0).max())
    best = groups(high)
    assert best is not None
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        found = groups(middle)
        low, high, best = (low, middle, found) if found else (middle, high, best)
    return best


def _in_group(
    lengths: np.ndarray, size: int, shape: AttentionShape, costs: Costs, ways: tuple[Pass, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f64[ways, documents] each: seconds, seconds of computing and bytes received, in a group of ``size`` workers."""
    rings = [
        (*chunked_ring(lengths, size, shape, costs, way), ring_bytes(lengths, size, shape, way))
        for way in ways
    ]
    ring = tuple(np.stack(rows) for rows in zip(*rings))
    if shape.heads % size:
        return ring[0], ring[1], ring[2]
    split = [
        np.stack(rows) for rows in zip(*(shared_heads(lengths, size, shape, costs, way) for way in ways))
    ]
    # A document has one layout for all passes.
    better = split[0].sum(0) < ring[0].sum(0)
    seconds, compute, received = (np.where(better, *both) for both in zip(split, ring))
    return seconds, compute, received
