"""When which workers fail: drawn from a seed, and done to a run of ``jaxllm launch``."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments._failover_account import Row, ledgers, read

# Of anything that is waited for, seconds.
PATIENCE = 900
# Fewer would leave out a kind of failure.
LEAST = 2


@dataclass(frozen=True)
class Event:
    """Failures that belong together.

    Attributes:
        kind: ``kill``; ``hang``; ``pair``, killed at once; ``again``, the second killed while the first is recovered from.
        workers: who, in order.
        after: steps after which the run has been whole.
        delay: share of a step, or of a recovery, that passes before it, in [0, 1).
    """

    kind: str
    workers: tuple[int, ...]
    after: int
    delay: float


def draw(failures: int, workers: int, seed: int) -> list[Event]:
    """Events with that many lost workers in all, in random order.

    From two failures on, rank 0 is killed and somebody while that is recovered from; from three on there is a hang, from
    five on a pair.

    Raises:
        ValueError: too few failures, or workers.
    """
    if failures < LEAST or workers < 3:
        raise ValueError(f"failures={failures}, workers={workers}: at least {LEAST} of at least 3 workers")
    rng = np.random.default_rng(seed)
    kinds = ["again"] + ["hang"] * (failures >= 3) + ["pair"] * (failures >= 5)
    count = sum(map(_size, kinds))
    while count < failures:
        allowed = ["kill", "hang", "pair", "again"] if failures - count > 1 else ["kill", "hang"]
        chances = np.array([0.7, 0.1, 0.1, 0.1][: len(allowed)])
        kinds.append(str(rng.choice(allowed, p=chances / chances.sum())))
        count += _size(kinds[-1])
    events = []
    for place, kind in enumerate(kinds):
        who = [int(each) for each in rng.permutation(workers)[: _size(kind)]]
        if place == 0 and 0 not in who:
            # While all live, worker 0 has rank 0.
            who[int(rng.integers(2))] = 0
        events.append(Event(kind, tuple(who), int(rng.integers(2, 7)), float(rng.random())))
    return [events[int(place)] for place in rng.permutation(len(events))]


def _size(kind: str) -> int:
    return 2 if kind in ("pair", "again") else 1


class Run:
    """One run of ``jaxllm launch``, with failures made from outside."""

    def __init__(self, folder: Path, command: Sequence[str], environment: dict[str, str], workers: int):
        self.folder, self.command, self.environment, self.workers = (
            folder,
            list(command),
            environment,
            workers,
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        """Start it, or go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "output", "ab") as output:
            self.process = subprocess.Popen(
                [*self.command, *more], env=self.environment, stdout=output, stderr=output
            )

    def journal(self, event: str | None = None) -> list[Row]:
        """Of the supervisor."""
        return [
            row for row in read(self.folder / "membership.jsonl") if event is None or row["event"] == event
        ]

    def step(self) -> int:
        """The newest that anybody has begun."""
        newest = [each[-1] for each in ledgers(self.folder, self.workers).values() if each]
        return max(newest, key=lambda row: row["time"])["step"] if newest else -1

    def pace(self) -> float:
        """Seconds between the last two steps that somebody began, at most 5."""
        times = max((rows for rows in ledgers(self.folder, self.workers).values()), key=len)[-2:]
        return min(5.0, times[-1]["time"] - times[0]["time"])

    def whole(self) -> bool:
        """All workers have made a step together, and none was lost since."""
        rows = self.journal()
        changes = [row for row in rows if row["event"] in ("lost", "world", "recovered")]
        return (
            bool(changes)
            and changes[-1]["event"] == "recovered"
            and len(changes[-1]["members"]) == self.workers
        )

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Until something holds.

        Raises:
            RuntimeError: the run ended first, or nothing happened for a quarter of an hour.
        """
        assert self.process is not None
        until = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"{self.folder}: ended with code {self.process.returncode}, not {what}; where it came to its end in "
                    f"peace give more --steps\n{self.told()}"
                )
            if time.monotonic() > until:
                raise RuntimeError(f"{self.folder}: not within {PATIENCE} s: {what}\n{self.told()}")
            time.sleep(0.05)

    def told(self) -> str:
        """The ends of what was printed."""
        files = [self.folder / "output", *sorted(self.folder.glob("worker-*.log"))]
        return "\n".join(file.read_text(errors="replace")[-1500:] for file in files if file.is_file())

    def pid(self, worker: int) -> int:
        """Of the worker's newest process."""
        return [row["pid"] for row in self.journal("started") if row["worker"] == worker][-1]

    def send(self, worker: int, number: int) -> float:
        """Send a signal; when, in seconds since the epoch."""
        at = time.time()
        os.kill(self.pid(worker), number)
        return at

    def end(self) -> None:
        """Kill it all: workers end with their supervisor."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        pids = [row["pid"] for row in self.journal("started")]
        until = time.monotonic() + 60
        while any(map(runs, pids)) and time.monotonic() < until:
            time.sleep(0.02)
        for pid in filter(runs, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            RuntimeError: it failed.
        """
        assert self.process is not None
        code = self.process.wait(PATIENCE)
        if code:
            raise RuntimeError(f"{self.folder}: ended with code {code}\n{self.told()}")


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def disturb(run: Run, events: Sequence[Event], tell: Callable[[str], None]) -> list[Row]:
    """Let the events happen to a running run, each when it is whole again; one row for every lost worker.

    A row has the event's number and kind, the worker, the time, the step, and how many checkpoints there were.
    """
    rows: list[Row] = []
    for number, event in enumerate(events):
        for worker, step, at in _happen(run, event):
            saved = run.folder / "checkpoints" / "steps"
            count = len(list(saved.iterdir())) if saved.is_dir() else 0
            place = {"event": number, "kind": event.kind, "worker": worker}
            rows.append({**place, "time": at, "step": step, "checkpoints": count})
            tell(f"{run.folder.name}: {event.kind}, worker {worker} in step {step}")
    run.wait(run.whole, "whole after the last failure")
    return rows


def _happen(run: Run, event: Event) -> Iterator[tuple[int, int, float]]:
    """(worker, step, time) of each signal sent."""
    approach(run, run.step() + event.after, event.delay, whole=True)
    first, *others = event.workers
    worlds = len(run.journal("world"))
    hung = event.kind == "hang"
    at = time.time()
    yield first, run.step(), run.send(first, signal.SIGSTOP if hung else signal.SIGKILL)
    if event.kind == "pair":
        yield others[0], run.step(), run.send(others[0], signal.SIGKILL)

    def lost(worker: int) -> bool:
        return any(row["worker"] == worker and row["time"] >= at - 0.001 for row in run.journal("lost"))

    run.wait(lambda: lost(first), f"worker {first} noticed")
    if event.kind == "again":
        if event.delay > 0.5:
            # The survivors are on their way into the next world already.
            run.wait(lambda: len(run.journal("world")) > worlds, "the next world formed")
        yield others[0], run.step(), run.send(others[0], signal.SIGKILL)
    run.wait(lambda: all(map(lost, event.workers)), "all losses noticed")


def approach(run: Run, step: int, delay: float, *, whole: bool) -> None:
    """Wait until a step, and a share of one more; ``whole``: from when the run is, and so many steps later."""
    if whole:
        ahead = step - run.step()
        run.wait(run.whole, "whole again")
        step = run.step() + ahead
    run.wait(lambda: run.step() >= step, f"at step {step}")
    time.sleep(delay * run.pace())


def restart(run: Run, events: Sequence[Row], heartbeat: float, tell: Callable[[str], None]) -> list[Row]:
    """The same failures where every one ends all workers, which go on from the newest checkpoint.

    A death is noticed at once, and the restart has no pause; a hang costs the heartbeat that it takes to notice.

    Args:
        run: started, with checkpoints.
        events: rows of :func:`disturb`; the failures of a pair are one restart.
        heartbeat: seconds until a hang is noticed.
        tell: shows a line.
    """
    rows: list[Row] = []
    for place, event in enumerate(events):
        before = events[place - 1] if place and events[place - 1]["event"] == event["event"] else None
        if before is not None and event["kind"] == "pair":
            continue
        if before is None:
            approach(run, event["step"], 0.5, whole=False)
        else:
            # During the recovery: the workers that were started again have formed their world.
            worlds = len(run.journal("world"))
            run.wait(lambda worlds=worlds: len(run.journal("world")) > worlds, "the world formed again")
        at, step = time.time(), run.step()
        if event["kind"] == "hang":
            run.send(event["worker"], signal.SIGSTOP)
            time.sleep(heartbeat)
        run.end()
        saved = (run.folder / "checkpoints" / "manifests").glob("*.json")
        newest = max((int(file.stem) for file in saved), default=0)
        run.start(*(["--resume"] if (run.folder / "checkpoints").is_dir() else []))
        rows.append(
            {"kind": event["kind"], "worker": event["worker"], "time": at, "step": step, "from": newest}
        )
        tell(f"{run.folder.name}: all stopped in step {step}, going on from {newest}")
    return rows
