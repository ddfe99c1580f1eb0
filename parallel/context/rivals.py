"""Context parallelism that needs no plan of blocks: documents in equal chunks, heads, groups of workers."""

import math
from typing import NamedTuple

import numpy as np

from parallel.context.blocks import pack
from parallel.context.costs import AttentionShape, Costs

_GRAIN = 1_000_000
_HALVINGS = 11


class Outcome(NamedTuple):
    """Of one attention layer's forward pass.

    Attributes:
        seconds: until the last worker is done.
        compute: f64[N], seconds that each worker computes.
        received: bytes of keys, values, queries and outputs that a worker receives in the mean.
        tokens: of the fullest worker over the mean.
    """

    seconds: float
    compute: np.ndarray
    received: float
    tokens: float


def causal_pairs(lengths: np.ndarray) -> np.ndarray:
    """f64: (query, key) pairs of each document."""
    lengths = np.asarray(lengths, np.float64)
    return lengths * (lengths + 1) / 2


def chunked_ring(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs
) -> tuple[np.ndarray, np.ndarray]:
    """Each document alone in 2N chunks, two opposite ones on each worker, keys and values passed on N - 1 times.

    Every worker has the same work; a step's kernel attends two pairs of chunks of L / 2N tokens, beside the transfer for
    the next step.

    Returns:
        f64[documents] each: seconds, and seconds of computing.
    """
    lengths = np.asarray(lengths, np.float64)
    flops = causal_pairs(lengths) * shape.pair_flops / workers
    if workers == 1:
        compute = flops / costs.rate(lengths, copying=False)
        return compute, compute
    compute = flops / costs.rate(lengths / (np.sqrt(2) * workers), copying=True)
    bandwidth, latency = costs.neighbour(workers)
    part, transfer = compute / workers, lengths / workers * shape.kv_bytes / bandwidth + latency
    return part + (workers - 1) * np.maximum(part, transfer), compute


def shared_heads(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each document whole, a share of the heads on each worker; the all-to-alls wait for nothing else.

    Returns:
        f64[documents] each: seconds, seconds of computing, bytes that a worker receives.

    Raises:
        ValueError: workers that do not divide the heads.
    """
    if shape.heads % workers:
        raise ValueError(f"ulysses on workers={workers}: must divide the {shape.heads} heads")
    lengths = np.asarray(lengths, np.float64)
    compute = causal_pairs(lengths) * shape.pair_flops / workers / costs.rate(lengths, copying=False)
    if workers == 1:
        return compute, compute, np.zeros_like(compute)
    # Where there are more workers than heads of keys, each of those goes to several.
    kv = max(shape.kv_heads / workers, 1.0) / shape.kv_heads * shape.kv_bytes
    back = lengths * (workers - 1) / workers * shape.query_bytes / workers
    into = back + lengths * (workers - 1) / workers * kv
    moved = costs.all_to_all_seconds(into, workers) + costs.all_to_all_seconds(back, workers)
    return compute + moved, compute, into + back


def zigzag_each(lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs) -> Outcome:
    """:func:`chunked_ring` of all documents at once, as TransformerEngine does: the ring of arXiv 2605.08524."""
    _, each = chunked_ring(lengths, workers, shape, costs)
    seconds = compute = float(each.sum())
    size = float(np.sum(lengths)) / workers * shape.kv_bytes
    if workers > 1:
        bandwidth, latency = costs.neighbour(workers)
        part = compute / workers
        seconds = part + (workers - 1) * max(part, size / bandwidth + latency)
    return Outcome(seconds, np.full(workers, compute), (workers - 1) * size, 1.0)


def ulysses(lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs) -> Outcome:
    """:func:`shared_heads` of all documents, in one all-to-all each way (arXiv 2309.14509)."""
    compute = float(shared_heads(lengths, workers, shape, costs)[1].sum())
    # Bytes and their time are proportional to tokens, so that all documents together are as one.
    seconds, alone, received = shared_heads(np.array([np.sum(lengths)]), workers, shape, costs)
    moved = float(seconds[0] - alone[0])
    return Outcome(compute + moved, np.full(workers, compute), float(received[0]), 1.0)


def grouping(lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs) -> Outcome:
    """Groups of 1, 2, 4, ... workers, as many of each as suit the batch, after FlexSP (arXiv 2412.01523).

    Each document goes to the smallest groups that finish it in the time that all are given; a group takes its documents
    one after the other, each as :func:`chunked_ring` or :func:`shared_heads`, whichever is faster. The least time is
    found by bisection. A worker holds at most ``costs.crowding`` times its share of tokens. In favour of it: regrouping
    costs nothing, and groups are as good as they come.
    """
    lengths = np.asarray(lengths, np.float64)
    sizes = [2**k for k in range(int(math.log2(workers)) + 1)]
    seconds, compute, received = (
        np.stack(rows) for rows in zip(*(_in_group(lengths, size, shape, costs) for size in sizes))
    )
    filling = lengths / (np.asarray(sizes)[:, None] * costs.crowding * lengths.sum() / workers)
    # All documents in one group of the largest size: nothing spreads tokens further.
    filling[-1] = 0

    def groups(limit: float) -> tuple[np.ndarray, np.ndarray, list[int]] | None:
        """Of each document the index of its size and its group; how many groups of each size. None: too many."""
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
    kind, group, made = best
    each, work, held, bytes_received = [], [], [], 0.0
    for index, size in enumerate(sizes):
        own = kind == index
        each.append(np.bincount(group[own], seconds[index, own], made[index]))
        work.append(np.repeat(np.bincount(group[own], compute[index, own], made[index]), size))
        held.append(np.bincount(group[own], lengths[own], made[index]) / size)
        bytes_received += float(received[index, own].sum()) * size
    busy = np.concatenate(work)
    return Outcome(
        float(np.concatenate(each).max()),
        np.concatenate([busy, np.zeros(workers - len(busy))]),
        bytes_received / workers,
        float(np.concatenate(held).max() / (lengths.sum() / workers)),
    )


def _in_group(
    lengths: np.ndarray, size: int, shape: AttentionShape, costs: Costs
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f64[documents] each: seconds, seconds of computing and bytes received, in a group of ``size`` workers."""
    seconds, compute = chunked_ring(lengths, size, shape, costs)
    received = (size - 1) / size * lengths * shape.kv_bytes
    if shape.heads % size:
        return seconds, compute, received
    split = shared_heads(lengths, size, shape, costs)
    better = split[0] < seconds
    return (
        np.where(better, split[0], seconds),
        np.where(better, split[1], compute),
        np.where(better, split[2], received),
    )
