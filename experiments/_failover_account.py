"""What the files of a run with failures say: which samples were trained, and what each failure cost. Nothing runs here.

A worker writes a line into ``rows-WORKER.jsonl`` before every step; the supervisor writes ``membership.jsonl``. A step
counts in the last world that began it and whose successor began after it: others' states were given up.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """Whole lines of a file that may be growing; none where it is not there yet."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def ledgers(folder: Path, workers: int) -> dict[int, list[Row]]:
    """What every worker has begun."""
    return {worker: read(folder / f"rows-{worker}.jsonl") for worker in range(workers)}


def lineage(begun: Mapping[int, Sequence[Row]]) -> dict[int, int]:
    """The world in which each step of the final state was trained."""
    found: dict[int, int] = {}
    by_world: dict[int, set[int]] = {}
    for row in (row for rows in begun.values() for row in rows):
        by_world.setdefault(row["generation"], set()).add(row["step"])
    for generation, steps in sorted(by_world.items()):
        found = {step: world for step, world in found.items() if step < min(steps)}
        found |= dict.fromkeys(steps, generation)
    return found


def samples(begun: Mapping[int, Sequence[Row]], steps: int, batch: int) -> dict[str, Any]:
    """Whether the final state was trained on every row of every batch, once.

    Args:
        begun: of :func:`ledgers`.
        steps: batches of the run.
        batch: rows of each.

    Returns:
        ``counted`` rows of the final state, (step, row) pairs ``lost`` and ``twice``, steps whose state had been trained on
        ``other_updates`` than the batches before it, and steps that were trained ``again`` after a failure.
    """
    worlds = lineage(begun)
    each: dict[int, Counter[int]] = {step: Counter() for step in range(steps)}
    wrong, tried = set(), set()
    for row in (row for rows in begun.values() for row in rows):
        step = row["step"]
        tried.add((row["generation"], step))
        if worlds.get(step) == row["generation"]:
            each.setdefault(step, Counter()).update(row["rows"])
            if row["updates"] != step:
                wrong.add(step)
    return {
        "counted": sum(found.total() for found in each.values()),
        "lost": [
            (step, r) for step, found in each.items() if step < steps for r in range(batch) if not found[r]
        ],
        "twice": [
            (step, r)
            for step, found in each.items()
            for r, times in found.items()
            if times > 1 or step >= steps or not 0 <= r < batch
        ],
        "other_updates": sorted(wrong),
        "again": len(tried) - len(worlds),
    }


def tokens(metrics: Sequence[Row], expected: Sequence[int]) -> dict[str, Any]:
    """The scored tokens of each step, as the device counted them, against those of the whole batch.

    Args:
        metrics: rows of metrics.jsonl.
        expected: of each batch, from the corpus.

    Returns:
        steps ``missing``, ``repeated`` and ``different``, and whether the ``sum`` of the run is that of the batches.
    """
    told = [row for row in metrics if row["kind"] == "train"]
    times = Counter(row["step"] for row in told)
    return {
        "missing": [step for step in range(1, len(expected) + 1) if not times[step]],
        "repeated": [step for step, count in times.items() if count > 1],
        "different": sorted({row["step"] for row in told if row["tokens"] != expected[row["step"] - 1]}),
        "sum": bool(told) and told[-1]["tokens_seen"] == sum(expected),
    }


def failure(
    worker: int, at: float, journal: Sequence[Row], begun: Mapping[int, Sequence[Row]], workers: int
) -> Row:
    """What the loss of a worker at a time (seconds since the epoch) led to; None for what has not happened.

    Returns:
        seconds of ``detection`` (to the supervisor's note), of ``recovery`` (to the first step of all who are left) and to
        ``readmission`` (to the first with it again), ``survivor_steps`` of the others until then, and ``kept``: each of the
        ``survivors`` (lost neither then nor since) trains in the same process before and after.
    """
    lost = _first(journal, at, "lost", lambda row: row["worker"] == worker)
    noted = at if lost is None else lost["time"]
    recovered = None if lost is None else _first(journal, noted, "recovered", lambda row: True)
    back = None if lost is None else _first(journal, noted, "recovered", lambda row: worker in row["members"])
    until = float("inf") if back is None else back["time"]
    world = None if back is None else back["generation"]
    steps = {
        (row["generation"], row["step"])
        for other, rows in begun.items()
        if other != worker
        for row in rows
        if at < row["time"] < until and row["generation"] != world
    }
    # Whoever was lost before and not back yet survives nothing.
    survivors = [
        other
        for other in set(range(workers)) - {worker}
        if not any(
            row["event"] == "lost"
            and row["worker"] == other
            and _seen(journal, other, at) <= row["time"] <= until
            for row in journal
        )
    ]
    return {
        "worker": worker,
        "time": at,
        "noted": None if lost is None else lost["time"],
        "why": None if lost is None else lost["why"],
        "detection": None if lost is None else lost["time"] - at,
        "recovery": None if recovered is None else recovered["time"] - at,
        "readmission": None if back is None else back["time"] - at,
        "alone": recovered is not None and worker not in recovered["members"],
        "survivor_steps": len(_counted(steps, begun)),
        "survivors": sorted(survivors),
        "kept": all(len(_pids(begun.get(other, ()), at, until)) == 1 for other in survivors),
    }


def _seen(journal: Sequence[Row], worker: int, at: float) -> float:
    """When a worker last made its first step in a world, before a time."""
    return max(
        (
            row["time"]
            for row in journal
            if row["event"] == "recovered" and row["time"] <= at and worker in row["members"]
        ),
        default=0.0,
    )


def others(journal: Sequence[Row], failures: Sequence[Row]) -> list[Row]:
    """Losses that are none of the failures."""
    noticed = {(each["worker"], each["noted"]) for each in failures}
    lost = [row for row in journal if row["event"] == "lost" and (row["worker"], row["time"]) not in noticed]
    return [{key: row[key] for key in ("time", "worker", "why")} for row in lost]


def _pids(rows: Sequence[Row], at: float, until: float) -> set[int]:
    """Of the last step before, of those between, and of the first one after."""
    before = [row["pid"] for row in rows if row["time"] <= at][-1:]
    after = [row["pid"] for row in rows if row["time"] >= until][:1]
    return {*before, *(row["pid"] for row in rows if at < row["time"] < until), *after}


def _first(journal: Sequence[Row], at: float, event: str, fits: Any) -> Row | None:
    # Times are rounded to milliseconds.
    rows = (row for row in journal if row["event"] == event and row["time"] >= at - 0.001 and fits(row))
    return next(rows, None)


def _counted(steps: Iterable[tuple[int, int]], begun: Mapping[int, Sequence[Row]]) -> set[int]:
    """Those of (world, step) that are in the final state."""
    worlds = lineage(begun)
    return {step for world, step in steps if worlds.get(step) == world}


def span(begun: Mapping[int, Sequence[Row]]) -> float:
    """Seconds from the begin of the first step to that of the last one, whatever happened between."""
    times = [row["time"] for rows in begun.values() for row in rows]
    return max(times) - min(times)


def progress(begun: Mapping[int, Sequence[Row]]) -> list[list[float]]:
    """[seconds since the first, step, workers that begin it] for every step of every world, in the order of time."""
    rows = sorted((row for each in begun.values() for row in each), key=lambda row: row["time"])
    # Nobody begins a step before all have begun the one before it.
    groups = [
        list(group) for _, group in itertools.groupby(rows, key=lambda row: (row["generation"], row["step"]))
    ]
    return [[round(group[0]["time"] - rows[0]["time"], 3), group[0]["step"], len(group)] for group in groups]


def break_even(runs: Mapping[str, Any], steps: int) -> dict[str, float]:
    """What restarts would have lost with other intervals between checkpoints.

    A restart costs what it takes to start, and the steps since the newest checkpoint, on average half an interval of them.

    Returns:
        ``restart_seconds``, one without its steps made twice, and ``checkpoints_apart``, the steps between checkpoints from
        which as many restarts lose more than MeCeFO did; 0 or less: with any.
    """
    pace = runs["undisturbed"]["seconds"] / (steps - 1)
    restarts = runs["restart"]["restarts"]
    twice = pace * sum(each["step"] - each["from"] for each in restarts)
    alone = (runs["restart"]["lost_seconds"] - twice) / len(restarts)
    apart = 2 * (runs["mecefo"]["lost_seconds"] / len(restarts) - alone) / pace
    return {"restart_seconds": alone, "checkpoints_apart": apart}
