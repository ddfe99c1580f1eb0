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
        after: i64[E]: a transfer of what its sender has computed in this step, which its receiver does not wait for; -1: of
            what is there, for which it waits.
        work: f64[N, steps], seconds of computing what a step brings.
    """

    step: np.ndarray
    sender: np.ndarray
    receiver: np.ndarray
    seconds: np.ndarray
    latency: np.ndarray
    size: np.ndarray
    after: np.ndarray
    work: np.ndarray


def play(
    steps: Steps,
    links: np.ndarray,
    computed: np.ndarray,
    pipelined: bool,
    room: float,
    apart: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """When each worker has computed everything, and when its link is free.

    A transfer begins when both ends have ended the step before it, its sender has computed what it sends, and the
    receiver has room; it takes as long as the busier of its two ends needs for all that it sends, or receives, in the
    step. A worker computes a step's work when all of it is there. Workers do not wait for others than their peers of a
    step.

    Args:
        steps: the transfers and what they unlock.
        links: f64[N], when each worker's link is free.
        computed: f64[N], when it is done with the work that needs no transfer.
        pipelined: links and kernels run at the same time; otherwise a worker does one thing after the other.
        room: of what ``size`` counts, how much a worker may have received and not computed; one step always fits.
        apart: what is sent once it is computed (``after``) has a queue of its own, in which a step waits for none of the
            other transfers; what both queues take of a link is up to ``seconds``.

    Returns:
        f64[N] each.
    """
    workers, count = steps.work.shape
    order = np.argsort(steps.step, kind="stable")
    bounds = np.searchsorted(steps.step[order], np.arange(count + 1))
    # Of each worker two queues, the second one behind all first ones.
    links, done = np.concatenate([links, links]), computed.copy()
    # finished[k]: when everything of the steps before k is computed.
    finished = np.zeros((count + 1, workers))
    before = _must_be_done(steps, workers, count, room) if pipelined and np.isfinite(room) else None
    for number in range(count):
        now = order[bounds[number] : bounds[number + 1]]
        seconds, after = steps.seconds[now], steps.after[now]
        queue = np.where(apart & (after >= 0), workers, 0)
        sender, receiver = steps.sender[now] + queue, steps.receiver[now] + queue
        begin = links if pipelined else np.maximum(links, np.tile(done, 2))
        accept = begin
        if before is not None:
            room_at = finished[before[number], np.arange(workers)]
            accept = np.maximum(begin, np.concatenate([room_at, np.zeros(workers)]))
        out = np.bincount(sender, seconds, 2 * workers)
        into = np.bincount(receiver, seconds, 2 * workers)
        end = np.maximum(begin[sender], accept[receiver])
        end = np.maximum(end, finished[after + 1, steps.sender[now]])
        end += np.maximum(out[sender], into[receiver]) + steps.latency[now]
        awaited, arrived = after < 0, np.zeros(workers)
        np.maximum.at(arrived, receiver[awaited], end[awaited])
        links = links.copy()
        np.maximum.at(links, receiver, end)
        np.maximum.at(links, sender, end)
        done = np.where(arrived > 0, np.maximum(done, arrived), done) + steps.work[:, number]
        finished[number + 1] = done
    return done, links.reshape(2, workers).max(0)


def _must_be_done(steps: Steps, workers: int, count: int, room: float) -> np.ndarray:
    """i64[steps, N]: how many steps a worker must have computed before it has room for a step."""
    got = np.zeros((count + 1, workers))
    np.add.at(got, (steps.step + 1, steps.receiver), steps.size)
    total = np.cumsum(got, axis=0)
    need = np.stack([np.searchsorted(total[:, w], total[1:, w] - room) for w in range(workers)], 1)
    return np.minimum(need, np.arange(count)[:, None])
