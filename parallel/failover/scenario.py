"""When which worker is down: windows of time, drawn at published rates or read from a file."""

import heapq
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import yaml

HOUR = 3600.0
Repair = Literal["fixed", "exponential"]
REPAIRS: tuple[Repair, ...] = get_args(Repair)


class ScenarioError(ValueError):
    """A scenario that cannot be: it says which window or field, what was given, and what is allowed."""


class Rate(NamedTuple):
    """How often some worker of a cluster fails, and how long it is away.

    Attributes:
        interval: mean seconds between two failures anywhere in the cluster.
        repair: mean seconds until a failed worker is back.
    """

    interval: float
    repair: float

    @property
    def down(self) -> float:
        """Workers that are down in the mean, in a cluster that is large against it."""
        return self.repair / self.interval


# Of 32 workers, as published (arXiv 2510.16415).
PUBLISHED = {
    "low": Rate(2 * HOUR, 4 * HOUR),
    "mid": Rate(1 * HOUR, 3 * HOUR),
    "high": Rate(0.5 * HOUR, 2 * HOUR),
}


class Window(NamedTuple):
    """A worker is down from ``begin``, and back at ``end``, both in seconds."""

    worker: int
    begin: float
    end: float


@dataclass(frozen=True)
class Scenario:
    """Failures and repairs of a run.

    Attributes:
        workers: how many there are.
        seconds: how long the run lasts.
        windows: in any order; a worker's windows do not overlap, but may touch.

    Raises:
        ScenarioError: as the class says.
    """

    workers: int
    seconds: float
    windows: tuple[Window, ...] = ()

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ScenarioError(f"scenario workers={self.workers}: must be at least 1")
        if not 0 < self.seconds < math.inf:
            raise ScenarioError(f"scenario seconds={self.seconds}: must be above 0 and finite")
        for window in self.windows:
            where = f"window of worker {window.worker}, {window.begin} to {window.end} s"
            if not 0 <= window.worker < self.workers:
                raise ScenarioError(f"{where}: unknown worker; the scenario has 0 to {self.workers - 1}")
            if not 0 <= window.begin < math.inf:
                raise ScenarioError(f"{where}: begin must be 0 or a later time")
            if not window.end > window.begin:
                raise ScenarioError(f"{where}: end must be after begin")
        for one, next_one in itertools.pairwise(sorted(self.windows)):
            if one.worker == next_one.worker and next_one.begin < one.end:
                raise ScenarioError(
                    f"windows of worker {one.worker} overlap: {one.begin} to {one.end} s and "
                    f"{next_one.begin} to {next_one.end} s; join them, or let the second begin at {one.end} s or later"
                )

    def mean_down(self) -> float:
        """Workers that are down, averaged over the run's time."""
        within = (min(w.end, self.seconds) - w.begin for w in self.windows if w.begin < self.seconds)
        return sum(within) / self.seconds


def draw_scenario(
    workers: int, seconds: float, rate: Rate, seed: int, repair: str = "fixed", warm: bool = False
) -> Scenario:
    """Failures as a Poisson process of the cluster; each strikes one of the workers that are up, all alike.

    The number of workers down is that of calls in Erlang's loss system, whose mean does not depend on how repair times
    are distributed: ``rate.down`` where workers are many. A failure that finds nobody up strikes nobody.

    Args:
        workers: how many.
        seconds: how long the run lasts.
        rate: of the whole cluster.
        seed: of the draw; the same gives the same scenario.
        repair: ``fixed`` times or ``exponential`` ones.
        warm: failures have been going on before the run begins, so that the mean number is down from its first second;
            otherwise all are up then, as in a run that has just been started.

    Raises:
        ScenarioError: a time that is not above 0, or an unknown ``repair``.
    """
    if not (rate.interval > 0 and rate.repair > 0):
        raise ScenarioError(f"rate interval={rate.interval} s, repair={rate.repair} s: both must be above 0")
    if repair not in REPAIRS:
        raise ScenarioError(f"repair={repair!r}: must be one of {', '.join(REPAIRS)}")
    rng = np.random.default_rng(seed)
    up = list(range(workers))
    away: list[tuple[float, int]] = []
    windows = []
    # Before a fixed repair time nothing of what happens is left; of an exponential one, e^-20.
    time = -rate.repair * (1 if repair == "fixed" else 20) if warm else 0.0
    while (time := time + rng.exponential(rate.interval)) < seconds:
        while away and away[0][0] <= time:
            up.append(heapq.heappop(away)[1])
        lasts = rate.repair if repair == "fixed" else rng.exponential(rate.repair)
        chosen = rng.integers(max(len(up), 1))
        if not up:
            continue
        up[chosen], up[-1] = up[-1], up[chosen]
        worker = up.pop()
        heapq.heappush(away, (time + lasts, worker))
        if time + lasts > 0:
            windows.append(Window(worker, max(time, 0.0), time + lasts))
    return Scenario(workers, seconds, tuple(windows))


def read_scenario(file: str | Path) -> Scenario:
    """A scenario from YAML or JSON: ``workers``, ``seconds``, and ``windows`` of ``worker``, ``begin``, ``end`` in seconds.

    Raises:
        ScenarioError: the file is none, with its name and what is wrong.
    """
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"scenario {file}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScenarioError(f"scenario {file}: is neither YAML nor JSON: {error}") from error
    try:
        top = _fields(found, "scenario", workers=int, seconds=float, windows=list)
        windows = [
            Window(**_fields(each, f"windows[{number}]", worker=int, begin=float, end=float))
            for number, each in enumerate(top["windows"])
        ]
        return Scenario(top["workers"], top["seconds"], tuple(windows))
    except ScenarioError as error:
        raise ScenarioError(f"scenario {file}: {error}") from None


def _fields(found: Any, where: str, **wanted: type) -> dict[str, Any]:
    """The wanted fields of a mapping, and no others; whole numbers are taken as floats."""
    if not isinstance(found, Mapping):
        raise ScenarioError(f"{where}: must be a mapping with {', '.join(wanted)}; it is {found!r:.60}")
    if more := [str(name) for name in found if name not in wanted]:
        raise ScenarioError(f"{where}: unknown {', '.join(more)}; allowed are {', '.join(wanted)}")
    values: dict[str, Any] = {}
    for name, kind in wanted.items():
        if name not in found:
            raise ScenarioError(f"{where}: {name} is missing")
        value = found[name]
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            names = {int: "a whole number", float: "a number", list: "a list"}
            raise ScenarioError(f"{where}: {name}={value!r:.60} must be {names[kind]}")
        values[name] = kind(value)
    return values
