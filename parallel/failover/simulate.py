"""A run under failures, played event by event: what it trains, what it loses and to what, and how much of it is approximate.

:mod:`parallel.failover.scenario` says who is down when, :mod:`parallel.failover.recovery` what a step then costs. Steps are
whole: a failure loses the step that it strikes, a returning worker waits for the end of one. Nothing is random here.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from parallel.failover.recovery import CheckpointRestart, Cluster, Pace, Recovery
from parallel.failover.scenario import Scenario

# train: steps that count; redone: steps that a restart has to do again; aborted: a step or checkpoint that a failure
# struck; save: a checkpoint; pause: after a failure or return; stall: nobody can train; unfinished: the step, checkpoint or
# pause in which the run ends.
Kind = Literal["train", "redone", "aborted", "save", "pause", "stall", "unfinished"]


@dataclass(frozen=True)
class Segment:
    """A stretch of time in which all do the same.

    Attributes:
        begin: seconds.
        end: seconds.
        kind: as listed above.
        down: how many workers are down or not yet taken back.
        steps: whole steps trained in it.
        pace: of each, where there are any.
    """

    begin: float
    end: float
    kind: Kind
    down: int
    steps: int = 0
    pace: Pace | None = None

    @property
    def batches(self) -> float:
        """Global batches' worth of tokens trained in it, kept or not."""
        return self.steps * self.pace.kept if self.pace else 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of a run. Work is counted in global batches; a healthy plain cluster trains one in ``step`` seconds.

    Attributes:
        seconds: of the run.
        step: of the healthy plain cluster.
        timeline: without gaps, in order.
    """

    seconds: float
    step: float
    timeline: tuple[Segment, ...]

    @cached_property
    def capacity(self) -> float:
        """Batches that a cluster without failures trains in the same time."""
        return self.seconds / self.step

    @cached_property
    def trained(self) -> float:
        """Batches that count in the end."""
        return sum(each.batches for each in self.timeline if each.kind == "train")

    @property
    def throughput(self) -> float:
        """Batches trained, whether they count in the end or not, over :attr:`capacity`."""
        return sum(each.batches for each in self.timeline) / self.capacity

    @property
    def goodput(self) -> float:
        """:attr:`trained` over :attr:`capacity`."""
        return self.trained / self.capacity

    @cached_property
    def lost(self) -> dict[str, float]:
        """Batches lost, by cause; with :attr:`trained` they are :attr:`capacity`.

        Causes are kinds of segments, and of steps that count ``slower`` (below 0 where they are faster than healthy ones)
        and ``dropped`` (a part of the batch that nobody trains).
        """
        found: dict[str, float] = defaultdict(float)
        for each in self.timeline:
            healthy = (each.end - each.begin) / self.step
            if each.kind == "train":
                found["slower"] += healthy - each.steps
                found["dropped"] += each.steps - each.batches
            else:
                found[each.kind] += healthy
        return dict(found)

    @property
    def touched(self) -> float:
        """Share of the batches that count whose gradient is approximate in some layer."""
        return self._share("touched")

    @property
    def approximate(self) -> float:
        """Share of the gradients of batches that count that are approximate, layers weighing alike."""
        return self._share("approximate")

    def _share(self, name: str) -> float:
        part = sum(s.steps * getattr(s.pace, name) for s in self.timeline if s.kind == "train" and s.pace)
        return part / self.trained if self.trained else 0.0


def simulate(cluster: Cluster, recovery: Recovery, scenario: Scenario) -> Outcome:
    """Play a run from its first second to its last.

    Raises:
        ValueError: the scenario has other workers than the cluster, or what the recovery refuses.
    """
    if scenario.workers != cluster.workers:
        raise ValueError(
            f"scenario workers={scenario.workers}: the cluster has {cluster.replicas} replicas x {cluster.stages} "
            f"stages = {cluster.workers}"
        )
    run = _Run(cluster, recovery, scenario)
    while run.now < scenario.seconds:
        run.advance()
    return Outcome(scenario.seconds, cluster.seconds, tuple(_joined(run.timeline)))


class _Run:
    """The state of a run between two activities."""

    def __init__(self, cluster: Cluster, recovery: Recovery, scenario: Scenario):
        self.now = 0.0
        self.timeline: list[Segment] = []
        self._cluster, self._recovery, self._seconds = cluster, recovery, scenario.seconds
        self._failures = sorted(
            ((w.begin, w.worker, w.end) for w in scenario.windows if w.begin < scenario.seconds), reverse=True
        )
        self._returns: list[tuple[float, int]] = []
        self._down: set[int] = set()
        self._paces: dict[frozenset[int], Pace | None] = {}
        # A pause that is still owed, steps since the last checkpoint, and where the timeline was then.
        self._owed, self._since, self._safe = 0.0, 0, 0
        self._checkpoints = recovery if isinstance(recovery, CheckpointRestart) else None

    def advance(self) -> None:
        """One activity, up to its end or to the event that ends it, and what that event brings."""
        self._admit()
        pace, saves = self._pace(), self._checkpoints
        if pace is None:
            self._wait("stall", math.inf)
        elif self._owed:
            self._wait("pause", self._owed)
        elif saves and self._since == saves.every:
            if self._steps("save", saves.save, 1, None):
                self._since, self._safe = 0, len(self.timeline)
        else:
            room = saves.every - self._since if saves else math.inf
            self._since += self._steps("train", pace.seconds, room, pace)
        self._strike()

    def _pace(self) -> Pace | None:
        down = frozenset(self._down)
        if down not in self._paces:
            self._paces[down] = self._recovery.pace(self._cluster, down)
        return self._paces[down]

    def _next_failure(self) -> float:
        return self._failures[-1][0] if self._failures else math.inf

    def _next_return(self) -> float:
        return self._returns[0][0] if self._returns else math.inf

    def _wait(self, kind: Kind, seconds: float) -> None:
        """Until it is over, a worker fails or returns, or the run ends."""
        end = min(self.now + seconds, self._next_failure(), self._next_return(), self._seconds)
        if kind == "pause":
            self._owed = max(self._owed - (end - self.now), 0.0) if end < self.now + seconds else 0.0
        over = kind == "pause" and self._owed > 0 and end == self._seconds
        self._note("unfinished" if over else kind, end)

    def _steps(self, kind: Kind, seconds: float, most: int | float, pace: Pace | None) -> int:
        """Whole steps until ``most``, the step in which a worker returns, a failure, or the end of the run; how many."""
        begin, failure = self.now, self._next_failure()
        wanted = min(most, _up((self._next_return() - begin) / seconds)) if seconds else most
        limit = min(failure, self._seconds)
        done = int(min(wanted, _down((limit - begin) / seconds) if seconds else wanted))
        if done:
            end = min(begin + done * seconds, limit)
            self._note(kind, end, done if kind == "train" else 0, pace)
        if done < wanted:
            self._note("aborted" if failure < self._seconds else "unfinished", limit)
        return done

    def _admit(self) -> None:
        """Take back whoever has returned."""
        while self._next_return() <= self.now:
            self._down.remove(heapq.heappop(self._returns)[1])
            self._owed = max(self._owed, self._recovery.on_repair)

    def _strike(self) -> None:
        """Failures of this moment; those who have returned until now are back already."""
        if self._next_failure() > self.now:
            return
        self._admit()
        while self._next_failure() <= self.now:
            _, worker, end = self._failures.pop()
            self._down.add(worker)
            heapq.heappush(self._returns, (end, worker))
        self._owed = max(self._owed, self._recovery.on_failure)
        if self._checkpoints:
            back = self.timeline[self._safe :]
            self.timeline[self._safe :] = [
                replace(each, kind="redone") if each.kind == "train" else each for each in back
            ]
            self._since, self._safe = 0, len(self.timeline)

    def _note(self, kind: Kind, end: float, steps: int = 0, pace: Pace | None = None) -> None:
        if end > self.now:
            self.timeline.append(Segment(self.now, end, kind, len(self._down), steps, pace))
            self.now = end


# Of a step: what rounding of sums of times may amount to.
_SLACK = 1e-6


def _down(steps: float) -> int | float:
    return math.floor(steps + _SLACK) if math.isfinite(steps) else steps


def _up(steps: float) -> int | float:
    return max(math.ceil(steps - _SLACK), 1) if math.isfinite(steps) else steps


def _joined(timeline: Iterable[Segment]) -> list[Segment]:
    """Neighbours that differ in nothing but their time as one."""
    found: list[Segment] = []
    for each in timeline:
        last = found[-1] if found else None
        if last and (last.kind, last.down, last.pace) == (each.kind, each.down, each.pace):
            found[-1] = replace(last, end=each.end, steps=last.steps + each.steps)
        else:
            found.append(each)
    return found
