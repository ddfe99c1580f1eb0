"""What a step costs and trains while some workers are down, by the way in which a system recovers.

Time is counted in the units of :mod:`parallel.failover.schedule`. What is counted is arithmetic alone: no communication, no
imbalance between stages, but for ``Cluster.outside``.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from parallel.failover.assignment import stage_owners
from parallel.failover.schedule import HEALTHY, SCHEDULES, Stage, pipeline_units


@dataclass(frozen=True)
class Cluster:
    """Workers that train one model: replicas of a pipeline; worker w is stage ``w % stages`` of replica ``w // stages``.

    Attributes:
        replicas: data-parallel ones.
        stages: p, of each; 1: data parallel only.
        micro: M, micro-batches of a replica in a step.
        seconds: of a step while nobody is down and nothing is done for the case of failures.
        outside: share of that step which is not the pipeline's (reduction, optimiser); it lasts as long in every step.
        schedule: of the pipelines, ``gpipe`` or ``1f1b``.

    Raises:
        ValueError: a count below 1, a time that is not above 0, a share outside [0, 1), or an unknown schedule.
    """

    replicas: int
    stages: int
    micro: int
    seconds: float = 1.0
    outside: float = 0.0
    schedule: str = "gpipe"

    def __post_init__(self) -> None:
        for name in ("replicas", "stages", "micro"):
            if getattr(self, name) < 1:
                raise ValueError(f"cluster {name}={getattr(self, name)}: must be at least 1")
        if not self.seconds > 0:
            raise ValueError(f"cluster seconds={self.seconds}: must be above 0")
        if not 0 <= self.outside < 1:
            raise ValueError(
                f"cluster outside={self.outside}: is a share of the step, at least 0 and below 1"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"cluster schedule={self.schedule!r}: must be one of {', '.join(SCHEDULES)}")

    @property
    def workers(self) -> int:
        """How many there are."""
        return self.replicas * self.stages

    @cached_property
    def units(self) -> float:
        """T_ok = 3 (p + M - 1): of a step's pipeline while nobody is down."""
        return self.pipeline([HEALTHY] * self.stages)

    def pipeline(self, stages: Sequence[Stage]) -> float:
        """Units of a pipeline of these stages over a replica's micro-batches."""
        return pipeline_units(tuple(stages), self.micro, self.schedule)

    def step(self, units: float) -> float:
        """Seconds of a step whose slowest pipeline takes ``units``."""
        return self.seconds * (self.outside + (1 - self.outside) * units / self.units)

    def dead(self, down: Iterable[int]) -> dict[int, frozenset[int]]:
        """Dead stages of each replica that has any."""
        found: dict[int, set[int]] = defaultdict(set)
        for worker in down:
            found[worker // self.stages].add(worker % self.stages)
        return {replica: frozenset(stages) for replica, stages in found.items()}


class Pace(NamedTuple):
    """Of steps while the same workers are down.

    Attributes:
        seconds: of a step.
        kept: share of the batch that is trained.
        touched: share of the batch whose gradient is approximate in some layer.
        approximate: share of the batch's gradients that are approximate, layers weighing alike.
    """

    seconds: float
    kept: float = 1.0
    touched: float = 0.0
    approximate: float = 0.0


@dataclass(frozen=True)
class Recovery:
    """What a system does about failures: :meth:`pace` while they last, pauses when they come and go.

    Attributes:
        on_failure: seconds that nobody trains after a failure.
        on_repair: after a worker's return.
    """

    on_failure: float = 0.0
    on_repair: float = 0.0

    def __post_init__(self) -> None:
        for name in ("on_failure", "on_repair"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"recovery {name}={getattr(self, name)}: must be 0 or more seconds")

    def pace(self, cluster: Cluster, down: frozenset[int]) -> Pace | None:
        """None: nobody can train until somebody returns."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mecefo(Recovery):
    """A neighbour does both tasks, and both of them with cheaper gradients (arXiv 2510.16415).

    In a pipeline the adjacent stage of the same replica takes a dead one; a replica in which none is left for it trains
    nothing. With one stage only, shards go to living workers, ceil(n/m) to the busiest.

    Attributes:
        skipped: a, share of the forward FLOPs in branches whose backward pass is left out.
        rest: units of the others, of which 1 is the forward pass: 1 recomputed and 1 for the gradient of inputs make 3, the
            low-rank products counted as nothing. A neighbour that does both tasks in full has ``skipped=0, rest=3``.
    """

    skipped: float = 1 / 3
    rest: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.skipped <= 1:
            raise ValueError(f"mecefo skipped={self.skipped}: is a share, from 0 to 1")
        if not self.rest >= 1:
            raise ValueError(f"mecefo rest={self.rest}: at least the forward pass, 1, is computed")

    @property
    def task(self) -> Stage:
        """Of one degraded task: 1 forward, the others backward; both passes are c / 2 = a + 3 f."""
        units = self.skipped + (1 - self.skipped) * self.rest
        return Stage(HEALTHY.forward, units - HEALTHY.forward)

    def pace(self, cluster: Cluster, down: frozenset[int]) -> Pace | None:
        if cluster.stages == 1:
            return self._shards(cluster, len(down))
        merged = Stage(*(2 * units for units in self.task))
        slowest, whole, helped, approximate = 0.0, cluster.replicas, 0, 0.0
        for dead in cluster.dead(down).values():
            whole -= 1
            owners = stage_owners(frozenset(range(cluster.stages)) - dead, cluster.stages)
            if owners is None:
                continue
            busy = set(owners.values())
            stages = [merged if s in busy else HEALTHY for s in range(cluster.stages) if s not in dead]
            slowest = max(slowest, cluster.pipeline(stages))
            helped += 1
            approximate += 2 * len(dead) / cluster.stages
        if not whole + helped:
            return None
        if whole:
            slowest = max(slowest, cluster.units)
        n = cluster.replicas
        return Pace(cluster.step(slowest), (whole + helped) / n, helped / n, approximate / n)

    def _shards(self, cluster: Cluster, down: int) -> Pace | None:
        n, live = cluster.replicas, cluster.replicas - down
        if not live:
            return None
        if not down:
            return Pace(cluster.step(cluster.units))
        busiest = -(-n // live) * sum(self.task) * cluster.micro
        # Who keeps a single job does it in full.
        single = max(live - down, 0)
        slowest = max(busiest, cluster.units if single else 0.0)
        return Pace(cluster.step(slowest), 1.0, (n - single) / n, (n - single) / n)


@dataclass(frozen=True)
class DropReplica(Recovery):
    """A replica with a dead worker trains nothing; the others go on with a smaller batch."""

    def pace(self, cluster: Cluster, down: frozenset[int]) -> Pace | None:
        kept = cluster.replicas - len(cluster.dead(down))
        return Pace(cluster.step(cluster.units), kept / cluster.replicas) if kept else None


@dataclass(frozen=True)
class CheckpointRestart(Recovery):
    """A failure ends the run; it starts again from its last checkpoint on as many workers.

    Attributes:
        every: steps between two checkpoints.
        save: seconds that a checkpoint holds up training.
        spares: workers that stand by and do not fail themselves; with more down than these all wait for a repair. None:
            always enough.
    """

    every: int = 100
    save: float = 0.0
    spares: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"checkpoint every={self.every} steps: must be at least 1")
        if not self.save >= 0:
            raise ValueError(f"checkpoint save={self.save}: must be 0 or more seconds")
        if self.spares is not None and self.spares < 0:
            raise ValueError(f"checkpoint spares={self.spares}: must be 0 or more workers, or None")

    def pace(self, cluster: Cluster, down: frozenset[int]) -> Pace | None:
        waits = self.spares is not None and len(down) > self.spares
        return None if waits else Pace(cluster.step(cluster.units))
