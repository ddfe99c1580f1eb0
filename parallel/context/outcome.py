"""What a simulation finds out about a layer of attention."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel.context.costs import AttentionShape, Costs, Pass


class Outcome(NamedTuple):
    """Of one or more passes.

    Attributes:
        seconds: until the last worker is done.
        compute: f64[N], seconds that each worker computes.
        received: bytes of keys, values, queries, outputs and their gradients that a worker receives in the mean, what a
            reshuffle moves not counted.
        tokens: of the fullest worker over the mean.
        traffic: of the worker that sends or receives most keys and values over the mean.
    """

    seconds: float
    compute: np.ndarray
    received: float
    tokens: float
    traffic: float = 1.0


def added(outcomes: Iterable[Outcome]) -> Outcome:
    """Of passes one after the other on the same layout; each begins when the last worker is done with the one before."""
    seconds, compute, received, tokens, traffic = zip(*outcomes)
    return Outcome(sum(seconds), np.sum(compute, axis=0), sum(received), max(tokens), max(traffic))


@dataclass(frozen=True)
class Result:
    """One layer's forward pass, backward pass, or both; ``mfu`` is the product of the three shares after it.

    Attributes:
        seconds: until the last worker is done.
        mfu: FLOPs that causal attention within documents needs, over the peak of all workers in that time.
        kernel: of the peak while kernels run, in the mean.
        balance: mean over slowest worker's time in kernels.
        overlap: the slowest worker's time in kernels over all time; the rest is waiting.
        received: bytes that a worker receives in the mean.
        tokens: of the fullest worker over the mean.
        traffic: of the worker that sends or receives most keys and values over the mean.
    """

    seconds: float
    mfu: float
    kernel: float
    balance: float
    overlap: float
    received: float
    tokens: float
    traffic: float


def result_of(
    pairs: float, ways: Iterable[Pass], shape: AttentionShape, costs: Costs, outcome: Outcome
) -> Result:
    """``pairs``: of (query, key) tokens that attention needs; ``ways``: the passes of the outcome."""
    flops = pairs * sum(shape.flops(way) for way in ways)
    compute = outcome.compute
    return Result(
        seconds=outcome.seconds,
        mfu=flops / (len(compute) * costs.peak * outcome.seconds),
        kernel=flops / (costs.peak * float(compute.sum())),
        balance=float(compute.mean() / compute.max()),
        overlap=float(compute.max()) / outcome.seconds,
        received=outcome.received,
        tokens=outcome.tokens,
        traffic=outcome.traffic,
    )
