"""When workers compute and when their links are busy: transfers in steps, each with the work that it unlocks."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Steps:
    """Transfers and work in the order of their steps; a step is one grouped call, whose transfers share their ends' links.

    Attributes:
        step: i64[E], of each transfer.
        sender: i64[E].
        receiver: i64[E].
        seconds: f64[E], of the transfer alone on its link.
        latency: f64[E].
        size: f64[E], what it takes of the receiver's room.
        work: f64[N, steps], seconds of computing what a step brings.
    """

    step: np.ndarray
    sender: np.ndarray
    receiver: np.ndarray
    seconds: np.ndarray
    latency: np.ndarray
    size: np.ndarray
    work: np.ndarray


def play(steps: Steps, links: np.ndarray, computed: np.ndarray, pipelined: bool, room: float) -> np.ndarray:
    """When each worker has computed everything.

    A transfer begins when both ends have ended the step before it and the receiver has room; it takes as long as the
    busier of its two ends needs for all that it sends, or receives, in the step. A worker computes a step's work when all
    of it is there. Workers do not wait for others than their peers of a step.

    Args:
        steps: the transfers and what they unlock.
        links: f64[N], when each worker's link is free.
        computed: f64[N], when it is done with the work that needs no transfer.
        pipelined: links and kernels run at the same time; otherwise a worker does one thing after the other.
        room: of what ``size`` counts, how much a worker may have received and not computed; one step always fits.

    Returns:
        f64[N].
    """
    workers, count = steps.work.shape
    order = np.argsort(steps.step, kind="stable")
    bounds = np.searchsorted(steps.step[order], np.arange(count + 1))
    links, done = links.copy(), computed.copy()
    # finished[k]: when everything of the steps before k is computed.
    finished = np.zeros((count + 1, workers))
    before = _must_be_done(steps, workers, count, room) if pipelined and np.isfinite(room) else None
    for number in range(count):
        now = order[bounds[number] : bounds[number + 1]]
        sender, receiver, seconds = steps.sender[now], steps.receiver[now], steps.seconds[now]
        begin = links if pipelined else np.maximum(links, done)
        accept = begin
        if before is not None:
            accept = np.maximum(begin, finished[before[number], np.arange(workers)])
        out = np.bincount(sender, seconds, workers)
        into = np.bincount(receiver, seconds, workers)
        end = np.maximum(begin[sender], accept[receiver]) + np.maximum(out[sender], into[receiver])
        end += steps.latency[now]
        arrived = np.zeros(workers)
        np.maximum.at(arrived, receiver, end)
        links = np.maximum(links, arrived)
        np.maximum.at(links, sender, end)
        done = np.where(arrived > 0, np.maximum(done, arrived), done) + steps.work[:, number]
        finished[number + 1] = done
    return done


def _must_be_done(steps: Steps, workers: int, count: int, room: float) -> np.ndarray:
    """i64[steps, N]: how many steps a worker must have computed before it has room for a step."""
    got = np.zeros((count + 1, workers))
    np.add.at(got, (steps.step + 1, steps.receiver), steps.size)
    total = np.cumsum(got, axis=0)
    need = np.stack([np.searchsorted(total[:, w], total[1:, w] - room) for w in range(workers)], 1)
    return np.minimum(need, np.arange(count)[:, None])
