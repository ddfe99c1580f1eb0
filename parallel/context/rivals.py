"""Context parallelism in which all workers share every document: in equal chunks, or by heads."""

import numpy as np

from parallel.context.costs import AttentionShape, Costs, Pass
from parallel.context.outcome import Outcome, added


def causal_pairs(lengths: np.ndarray) -> np.ndarray:
    """f64: (query, key) pairs of each document."""
    lengths = np.asarray(lengths, np.float64)
    return lengths * (lengths + 1) / 2


def chunked_ring(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs, way: Pass = "forward"
) -> tuple[np.ndarray, np.ndarray]:
    """Each document alone in 2N chunks, two opposite ones on each worker, keys and values passed on N - 1 times.

    Every worker has the same work; a step's kernel attends two pairs of chunks of L / 2N tokens, beside the transfer for
    the next step. Backward passes the gradients of keys and values on behind them, and at last home, N times.

    Returns:
        f64[documents] each: seconds, and seconds of computing.
    """
    lengths = np.asarray(lengths, np.float64)
    flops = causal_pairs(lengths) * shape.flops(way) / workers
    if workers == 1:
        compute = flops / costs.rate(lengths, copying=False)
        return compute, compute
    compute = flops / costs.rate(lengths / (np.sqrt(2) * workers), copying=True)
    return _rotated(compute, lengths, workers, shape, costs, way), compute


def _rotated(
    compute: np.ndarray, tokens: np.ndarray, workers: int, shape: AttentionShape, costs: Costs, way: Pass
) -> np.ndarray:
    """f64: seconds of N steps of equal work, each beside what is passed on in it; ``tokens`` of all workers."""
    bandwidth, latency = costs.neighbour(workers)
    part, share = compute / workers, tokens / workers
    keys = share * shape.kv_bytes / bandwidth + latency
    if way == "forward":
        return part + (workers - 1) * np.maximum(part, keys)
    gradients = share * shape.gradient_kv_bytes / bandwidth + latency
    # Keys for the next step, gradients of the one before, in one message where both are due.
    both = np.maximum(part, keys + gradients - latency)
    return np.maximum(part, keys) + (workers - 2) * both + np.maximum(part, gradients) + gradients


def shared_heads(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs, way: Pass = "forward"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each document whole, a share of the heads on each worker; the all-to-alls wait for nothing else.

    Forward brings queries, keys and values and returns outputs; backward brings the gradients of outputs, and returns those
    of queries, keys and values.

    Returns:
        f64[documents] each: seconds, seconds of computing, bytes that a worker receives.

    Raises:
        ValueError: workers that do not divide the heads.
    """
    if shape.heads % workers:
        raise ValueError(f"ulysses on workers={workers}: must divide the {shape.heads} heads")
    lengths = np.asarray(lengths, np.float64)
    compute = causal_pairs(lengths) * shape.flops(way) / workers / costs.rate(lengths, copying=False)
    if workers == 1:
        return compute, compute, np.zeros_like(compute)
    # Where there are more workers than heads of keys, each of those goes to several.
    kv = shape.kv_bytes if way == "forward" else shape.gradient_kv_bytes
    kv *= max(shape.kv_heads / workers, 1.0) / shape.kv_heads
    less = lengths * (workers - 1) / workers * shape.query_bytes / workers
    more = less + lengths * (workers - 1) / workers * kv
    moved = costs.all_to_all_seconds(more, workers) + costs.all_to_all_seconds(less, workers)
    return compute + moved, compute, more + less


def zigzag_each(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs, ways: tuple[Pass, ...]
) -> Outcome:
    """:func:`chunked_ring` of all documents at once, as TransformerEngine does: the ring of arXiv 2605.08524."""
    return added(_zigzag_pass(lengths, workers, shape, costs, way) for way in ways)


def _zigzag_pass(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs, way: Pass
) -> Outcome:
    # All documents are as one, but for their chunks.
    compute = chunked_ring(lengths, workers, shape, costs, way)[1].sum(keepdims=True)
    tokens = np.array([np.sum(lengths)])
    seconds = compute if workers == 1 else _rotated(compute, tokens, workers, shape, costs, way)
    received = ring_bytes(tokens, workers, shape, way)
    return Outcome(float(seconds[0]), np.full(workers, compute[0]), float(received[0]), 1.0)


def ring_bytes(tokens: np.ndarray, workers: int, shape: AttentionShape, way: Pass) -> np.ndarray:
    """f64: bytes that a worker of a ring receives; keys need not come home, their gradients do."""
    received = (workers - 1) / workers * tokens * shape.kv_bytes
    if way == "backward" and workers > 1:
        received = received + tokens * shape.gradient_kv_bytes
    return received


def ulysses(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs, ways: tuple[Pass, ...]
) -> Outcome:
    """:func:`shared_heads` of all documents, in one all-to-all each way (arXiv 2309.14509)."""
    return added(_ulysses_pass(lengths, workers, shape, costs, way) for way in ways)


def _ulysses_pass(
    lengths: np.ndarray, workers: int, shape: AttentionShape, costs: Costs, way: Pass
) -> Outcome:
    compute = float(shared_heads(lengths, workers, shape, costs, way)[1].sum())
    # Bytes and their time are proportional to tokens, so that all documents together are as one.
    seconds, alone, received = shared_heads(np.array([np.sum(lengths)]), workers, shape, costs, way)
    moved = float(seconds[0] - alone[0])
    return Outcome(compute + moved, np.full(workers, compute), float(received[0]), 1.0)
