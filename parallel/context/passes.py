"""A forward or a backward pass over a spread of pieces: its transfers and its work as steps, played from end to end.

Backward fetches keys and values again in the steps of forward, or finds them kept, and sends the gradients of each step's
keys and values back the way they came (arXiv 2605.08524: pull, compute and push in one pipeline). Queries, outputs and
their gradients stay where they are, but for a reshuffle.
"""

from typing import NamedTuple

import numpy as np

from parallel.context.costs import AttentionShape, Costs, Pass
from parallel.context.outcome import Outcome
from parallel.context.timeline import Steps, play
from parallel.context.work import Spread, Work


class Reshuffle(NamedTuple):
    """Of tokens from the order of the batch to where pieces lie, and back.

    Attributes:
        into: seconds.
        back: seconds.
        first: seconds until a piece is there.
        overlapped: local work runs beside it, at both ends as long as each lasts.
    """

    into: float = 0.0
    back: float = 0.0
    first: float = 0.0
    overlapped: bool = False


STAY = Reshuffle()


def run(
    spread: Spread,
    work: Work,
    way: Pass,
    shape: AttentionShape,
    costs: Costs,
    *,
    reshuffle: Reshuffle = STAY,
    pipelined: bool = True,
    kept: bool = False,
    apart: bool = True,
) -> Outcome:
    """One pass.

    Args:
        spread: who computes and sends what.
        work: of the spread.
        way: forward or backward.
        shape: of attention.
        costs: of the machine.
        reshuffle: of this pass.
        pipelined: transfers run beside kernels.
        kept: backward finds the keys and values that forward has fetched.
        apart: keys and their gradients are sent in queues of their own, each at half the rate of a link; otherwise one queue
            takes turns, in which keys also wait for the gradients of slower workers. Of no matter without a pipeline.
    """
    apart &= pipelined
    rate = costs.rate(work.tokens, copying=pipelined and len(spread.moves) > 0)
    seconds = work.pairs * shape.flops(way) / rate
    local = np.bincount(work.worker, np.where(work.step < 0, seconds, 0.0), spread.workers)
    steps = steps_of(spread, work, seconds, way, shape, costs, pipelined=pipelined, kept=kept, apart=apart)
    into, back, first, overlapped = reshuffle
    overlapped &= into + back > 0
    # Of local work what begins the pass; the rest hides what ends it.
    share = into / (into + back) if overlapped else 0.5 if way == "backward" else 1.0
    head, tail = local * share, local * (1 - share)
    begin = np.maximum(into, first + head) if overlapped else into + head
    done, free = play(steps, np.full(spread.workers, into), begin, pipelined, costs.room, apart)
    if way == "forward":
        # Whoever has sent its last keys has nothing to wait for.
        free = done
    if overlapped:
        end = np.maximum(np.maximum(done, free) + back, done + tail + first * back / into)
    else:
        end = np.maximum(done + tail, free) + back
    held = np.bincount(spread.worker, spread.length, spread.workers)
    return Outcome(
        float(end.max()),
        np.bincount(work.worker, seconds, spread.workers),
        received_bytes(spread, way, shape, kept) / spread.workers,
        float(held.max() / held.mean()),
        busiest_link(spread),
    )


def busiest_link(spread: Spread) -> float:
    """What the worker that sends or receives most sends or receives, over the mean; 1 where nothing travels."""
    moves, tokens = spread.moves, spread.length[spread.moves.block]
    if not len(moves):
        return 1.0
    ends = (np.bincount(end, tokens, spread.workers) for end in (moves.sender, moves.receiver))
    return float(max(each.max() for each in ends) / tokens.sum() * spread.workers)


def received_bytes(spread: Spread, way: Pass, shape: AttentionShape, kept: bool = False) -> float:
    """Bytes that all workers receive in a pass."""
    each = 0 if way == "backward" and kept else shape.kv_bytes
    if way == "backward":
        each += shape.gradient_kv_bytes
    return float(spread.length[spread.moves.block].sum()) * each


def steps_of(
    spread: Spread,
    work: Work,
    seconds: np.ndarray,
    way: Pass,
    shape: AttentionShape,
    costs: Costs,
    *,
    pipelined: bool,
    kept: bool,
    apart: bool,
) -> Steps:
    """The steps of a pass: what ``work`` needs, and in backward what comes of it; arguments as in :func:`run`."""
    moves, step = spread.moves, spread.step
    # In one queue the gradients of a step leave, while the next one is computed, with the keys of the one after it; without
    # a pipeline with those of the next one.
    lag = 0 if way == "forward" or not spread.steps else 2 if pipelined and not apart else 1
    count = spread.steps + lag
    remote = work.step >= 0
    at = work.worker[remote] * count + work.step[remote]
    unlocked = np.bincount(at, seconds[remote], spread.workers * count).reshape(spread.workers, count)
    crossing = costs.crossing(moves.sender, moves.receiver)
    tokens = spread.length[moves.block].astype(np.float64)
    alone = tokens / np.where(crossing, costs.network, costs.nvlink)
    if way == "backward" and apart and not kept:
        alone = 2 * alone
    latency = np.where(crossing, costs.network_latency, costs.nvlink_latency)
    none = np.full(len(moves), -1)
    # step, sender, receiver, seconds, latency, size, after
    parts = []
    if way == "forward" or not kept:
        parts.append((step, moves.sender, moves.receiver, alone * shape.kv_bytes, latency, tokens, none))
    if way == "backward":
        home = alone * shape.gradient_kv_bytes
        parts.append((step + lag, moves.receiver, moves.sender, home, latency, np.zeros(len(moves)), step))
    return Steps(*(np.concatenate(each) for each in zip(*parts)), work=unlocked)
