"""Throughput of training under failures, simulated, beside what MeCeFO's paper (arXiv 2510.16415) measured on 32 A100.

Command:  python -m experiments.failover_simulator [--quick] [--out FILE]
Time:     not taken on idle cores; about two minutes of one core, --quick half a minute.
Expected: a merged stage's cost decides. With eight stages MeCeFO's published drops (1.07, 2.98 and 4.18 %) come out only at one
          to six micro-batches of a replica, and a full pipeline loses 25 % and more. With
          eight stages or more it loses less than Bamboo and, Oobleck's pauses left out, more than Oobleck: 5.0 and 6.7 times
          less never come out together.

Nothing runs on a GPU here and nothing is fitted: whatever the paper does not state is a free parameter, listed in the result
with where its value comes from, and varied. Scenarios are drawn from fixed seeds, the same ones for every system; a drop is
against the same system without failures, ± is 95 % confidence.
"""

import argparse
import datetime
import functools
import itertools
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from experiments._failover_models import (
    HYBRIDS,
    POLICIES,
    PUBLISHED,
    degraded,
    hybrid,
    low_rank_units,
    shares,
)
from experiments._failover_report import draw, show
from jaxllm.cli import machine
from parallel.failover.recovery import CheckpointRestart, Cluster, DropReplica, Mecefo, Recovery
from parallel.failover.rivals import Bamboo, Oobleck
from parallel.failover.scenario import HOUR, Rate, Scenario, draw_scenario
from parallel.failover.scenario import PUBLISHED as RATES
from parallel.failover.schedule import SCHEDULES
from parallel.failover.simulate import simulate

ROOT = Path(__file__).parents[1]
OUT = ROOT / "experiments" / "results" / "failover_simulator.json"
WORKERS, DAYS, LENGTH = 32, 1.0, 4096
STAGES, MICRO = (4, 8, 16), (1, 2, 3, 4, 6, 8, 16, 32)
BASE = {"stages": 8, "micro": 8, "schedule": "1f1b"}
RESTART, SAVE = 120.0, 10.0

# What the paper leaves open, or says nothing of at all.
FREE = [
    ("stages, replicas", "4 to 16 stages of 32 workers, as many replicas as fit", "not stated; varied"),
    ("micro-batches", f"{MICRO[0]} to {MICRO[-1]} of a replica", "not stated; varied"),
    ("schedule", ", ".join(SCHEDULES), "not stated; varied"),
    ("sequence length", "256", "the recipe that the models come from; decides the seconds of a step only"),
    ("shares a, f", "of each model's matrix products, the head with f", "counted by jaxllm.train.flops"),
    ("low-rank products", "0", "the published count; varied at rank d/16"),
    ("pause of MeCeFO, Bamboo, Oobleck", "0 s", "failures were injected between steps; varied"),
    ("step outside the pipeline", "0", "no communication is counted; varied"),
    (
        "Bamboo's redundancy",
        "1 unit of 3 always, 6 for 3 after a failure",
        "counted; nothing hidden in bubbles",
    ),
    ("Oobleck's smallest pipeline", "half of the stages", "assumed; memory is not counted"),
    ("restart, checkpoint", f"{RESTART:.0f} s, {SAVE:.0f} s", "assumed; varied; spares without end"),
    ("steps between checkpoints", "sqrt(2 x checkpoint x interval)", "Young's optimum"),
    ("repair times", "fixed", "not stated; their mean alone decides how many are down"),
    ("before the run", "failures go on since ever", "not stated; a fresh start is varied"),
]


@functools.lru_cache(4096)
def _scenario(workers: int, seconds: float, rate: Rate, seed: int, warm: bool) -> Scenario:
    return draw_scenario(workers, seconds, rate, seed, warm=warm)


def measure(
    cluster: Cluster,
    recovery: Recovery,
    rate: Rate,
    trials: int,
    seconds: float = DAYS * 24 * HOUR,
    warm: bool = True,
) -> dict[str, Any]:
    """Means over trials of what :class:`parallel.failover.simulate.Outcome` says; ``drop`` in percent, with its ±."""
    healthy = recovery.pace(cluster, frozenset())
    assert healthy is not None
    alone = cluster.seconds / healthy.seconds
    runs = [
        simulate(cluster, recovery, _scenario(cluster.workers, seconds, rate, seed, warm))
        for seed in range(trials)
    ]
    drops = 100 * (1 - np.array([each.goodput for each in runs]) / alone)
    lost: dict[str, float] = {}
    for each in runs:
        for cause, batches in each.lost.items():
            lost[cause] = lost.get(cause, 0.0) + 100 * batches / each.capacity / trials
    return {
        "drop": float(drops.mean()),
        "error": float(1.96 * drops.std(ddof=1) / math.sqrt(trials)),
        "healthy": alone,
        "throughput": float(np.mean([each.throughput for each in runs])),
        "goodput": float(np.mean([each.goodput for each in runs])),
        "lost": lost,
        "touched": float(np.mean([each.touched for each in runs])),
        "approximate": float(np.mean([each.approximate for each in runs])),
    }


def cluster_of(seconds: float, workers: int = WORKERS, **more: Any) -> Cluster:
    """Of the base, changed."""
    fields = {**BASE, **more}
    stages = fields.pop("stages")
    return Cluster(workers // stages, stages, seconds=seconds, **fields)


def systems(cluster: Cluster, mecefo: Mecefo, rate: Rate, layers: int) -> dict[str, Recovery]:
    """All, on one cluster."""
    every = max(round(math.sqrt(2 * SAVE * rate.interval) / cluster.seconds), 1)
    return {
        "MeCeFO": mecefo,
        "Bamboo-like": Bamboo(),
        "Oobleck-like": Oobleck(layers=layers, least=-(-cluster.stages // 2)),
        "checkpoint-restart": CheckpointRestart(RESTART, every=every, save=SAVE),
        "drop the replica": DropReplica(),
    }


def layers_of(pattern: str) -> int:
    """Layers in the sense of a transformer, of two sub-blocks each."""
    return len(pattern) // 2


def grid(trials: int, quick: bool) -> list[dict[str, Any]]:
    """Drops at the high rate by size, stages, micro-batches and schedule."""
    rows = []
    cases = list(
        itertools.product(PUBLISHED, (8,) if quick else STAGES, MICRO[1::3] if quick else MICRO, SCHEDULES)
    )
    for size, stages, micro, schedule in track(cases, description="published drops"):
        model = PUBLISHED[size]
        cluster = cluster_of(model.step_seconds, stages=stages, micro=micro, schedule=schedule)
        found = systems(
            cluster, degraded(model.cfg, model.tokens), RATES["high"], layers_of(model.cfg.pattern)
        )
        row: dict[str, Any] = {"size": size, "stages": stages, "micro": micro, "schedule": schedule}
        for name in ("MeCeFO", "Bamboo-like", "Oobleck-like"):
            result = measure(cluster, found[name], RATES["high"], trials)
            row[name] = {key: result[key] for key in ("drop", "error", "healthy")}
            row[name]["dropped"] = result["lost"].get("dropped", 0.0)
        rows.append(row)
    return rows


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each published drop, by stages and schedule: the micro-batches around it, and the range of drops."""
    found = []
    for size, model in PUBLISHED.items():
        names = ("Bamboo-like", "Oobleck-like", "MeCeFO", "MeCeFO")
        for (name, drop, slower), (stages, schedule) in itertools.product(
            zip(names, (*model.drops, model.drops[-1]), (False, False, False, True)),
            dict.fromkeys((r["stages"], r["schedule"]) for r in rows),
        ):
            line = [r for r in rows if (r["size"], r["stages"], r["schedule"]) == (size, stages, schedule)]
            drops = {r["micro"]: r[name]["drop"] - slower * r[name]["dropped"] for r in line}
            found.append(
                {
                    "claim": f"{name} {size}" + ", dropped replicas not counted" * slower,
                    "published": drop,
                    "stages": stages,
                    "schedule": schedule,
                    "between": bracket(drops, drop),
                    "lowest": min(drops.values()),
                    "highest": max(drops.values()),
                }
            )
    return found


def bracket(drops: dict[int, float], published: float) -> list[int] | None:
    """The two neighbouring numbers of micro-batches whose drops enclose a published one; None: none do."""
    for (few, low), (many, high) in itertools.pairwise(sorted(drops.items())):
        if min(low, high) <= published <= max(low, high):
            return [few, many]
    return None


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops of the rivals over MeCeFO's at 7B, wherever MeCeFO loses anything that can be told from nothing."""
    return [
        {
            **{key: row[key] for key in ("stages", "micro", "schedule")},
            "mecefo": row["MeCeFO"]["drop"],
            "bamboo": row["Bamboo-like"]["drop"] / row["MeCeFO"]["drop"],
            "oobleck": row["Oobleck-like"]["drop"] / row["MeCeFO"]["drop"],
        }
        for row in rows
        if row["size"] == "7B" and row["MeCeFO"]["drop"] > 2 * row["MeCeFO"]["error"]
    ]


def sensitivity(trials: int) -> list[dict[str, Any]]:
    """MeCeFO at 7B, one free parameter changed at a time."""
    model, rate = PUBLISHED["7B"], RATES["high"]
    plain, mecefo = cluster_of(model.step_seconds), degraded(model.cfg, model.tokens)
    rest = mecefo.rest + low_rank_units(model.cfg)
    cases: list[tuple[str, Cluster, Recovery, Rate, dict[str, Any]]] = [("base", plain, mecefo, rate, {})]
    cases += [(f"repair {h} h", plain, mecefo, Rate(rate.interval, h * HOUR), {}) for h in (0.1, 0.5, 1, 4)]
    cases += [
        (f"{100 * o:.0f} % outside", replace(plain, outside=o), mecefo, rate, {}) for o in (0.25, 0.5, 0.75)
    ]
    cases += [
        (
            f"pause {s} s at failures and returns",
            plain,
            replace(mecefo, on_failure=float(s), on_repair=float(s)),
            rate,
            {},
        )
        for s in (10, 60)
    ]
    cases += [
        ("low-rank products at rank d/16", plain, replace(mecefo, rest=rest), rate, {}),
        ("activations kept, not recomputed", plain, replace(mecefo, rest=mecefo.rest - 1), rate, {}),
        ("nothing skipped", plain, replace(mecefo, skipped=0.0), rate, {}),
        ("gpipe", replace(plain, schedule="gpipe"), mecefo, rate, {}),
        ("data parallel only", cluster_of(model.step_seconds, stages=1), mecefo, rate, {}),
    ]
    for size, each in PUBLISHED.items():
        hours = each.steps * each.step_seconds / HOUR
        cases.append(
            (
                f"a fresh run of {hours:.1f} h ({size})",
                plain,
                mecefo,
                rate,
                {"seconds": hours * HOUR, "warm": False},
            )
        )
    rows = []
    for name, cluster, recovery, at, more in track(cases, description="sensitivity"):
        rows.append({"change": name, **_brief(measure(cluster, recovery, at, trials, **more))})
    found = systems(plain, mecefo, rate, layers_of(model.cfg.pattern))
    for name, pauses in (("checkpoint-restart", (30, 120, 600)), ("Oobleck-like", (10, 60, 300))):
        for seconds in pauses:
            paused = replace(found[name], on_failure=float(seconds))
            if name == "Oobleck-like":
                paused = replace(paused, on_repair=float(seconds))
            rows.append(
                {"change": f"{name}, pause {seconds} s", **_brief(measure(plain, paused, rate, trials))}
            )
    return rows


def _brief(result: dict[str, Any]) -> dict[str, float]:
    """What a sensitivity shows of :func:`measure`."""
    brief = {key: result[key] for key in ("drop", "error", "touched")}
    return {**brief, "dropped": result["lost"].get("dropped", 0.0)}


def by_rate(trials: int) -> list[dict[str, Any]]:
    """All systems at the three published rates, 7B."""
    model, rows = PUBLISHED["7B"], []
    cluster = cluster_of(model.step_seconds)
    for name, rate in track(list(RATES.items()), description="rates"):
        found = systems(cluster, degraded(model.cfg, model.tokens), rate, layers_of(model.cfg.pattern))
        rows += [
            {"rate": name, "system": system, **measure(cluster, recovery, rate, trials)}
            for system, recovery in found.items()
        ]
    return rows


def by_model(trials: int, names: Iterable[str]) -> list[dict[str, Any]]:
    """Hybrid and mixture-of-experts models at the high rate: what is skipped decides what a merged stage costs."""
    rows = []
    for name in track(list(names), description="models"):
        cfg = hybrid(name)
        skips = {policy: "".join(filter(cfg.pattern.count, letters)) for policy, letters in POLICIES.items()}
        # Policies that come to the same for a model are one.
        for skipped, policy in {letters: policy for policy, letters in skips.items()}.items():
            mecefo = degraded(cfg, LENGTH, policy)
            row: dict[str, Any] = {
                "model": name,
                "shares": shares(cfg, LENGTH),
                "policy": policy,
                "skips": skipped,
                "skipped": mecefo.skipped,
                "pair": 2 * sum(mecefo.task),
            }
            for micro in (4, 8, 32):
                result = measure(cluster_of(2.0, micro=micro), mecefo, RATES["high"], trials)
                row[f"micro {micro}"] = {key: result[key] for key in ("drop", "error", "approximate")}
            rows.append(row)
    return rows


def at_scale(trials: int, quick: bool) -> list[dict[str, Any]]:
    """More workers: as many failures of the cluster as published, or of each worker."""
    model, rows = PUBLISHED["7B"], []
    high = RATES["high"]
    for workers in track((128,) if quick else (128, 1024), description="scale"):
        cluster = cluster_of(model.step_seconds, workers)
        for name, rate in (
            ("of the cluster", high),
            ("of each worker", Rate(high.interval * WORKERS / workers, high.repair)),
        ):
            found = systems(cluster, degraded(model.cfg, model.tokens), rate, layers_of(model.cfg.pattern))
            rows += [
                {
                    "workers": workers,
                    "rate": name,
                    "down": rate.down,
                    "system": system,
                    **measure(cluster, recovery, rate, max(trials // 5, 2), 6 * HOUR),
                }
                for system, recovery in found.items()
            ]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Simulate, write, print and draw; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few cases and trials; no result file but --out")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args(argv)
    trials = 4 if options.quick else 40
    out = options.out or (ROOT / "runs" / OUT.name if options.quick else OUT)
    rows = grid(trials, options.quick)
    report = {
        "command": "python -m experiments.failover_simulator",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": {
            "workers": WORKERS,
            "trials": trials,
            "seeds": [0, trials - 1],
            "hours": 24 * DAYS,
            "base": BASE,
            "tokens of hybrid models": LENGTH,
            "rates": {name: rate._asdict() for name, rate in RATES.items()},
        },
        "free": [dict(zip(("parameter", "value", "source"), each)) for each in FREE],
        "versions": machine.versions(),
        "shares": {
            size: {**shares(m.cfg, m.tokens), "pair": 2 * sum(degraded(m.cfg, m.tokens).task)}
            for size, m in PUBLISHED.items()
        },
        "published": {
            size: {key: value for key, value in asdict(m).items() if key != "cfg"}
            for size, m in PUBLISHED.items()
        },
        "grid": rows,
        "claims": claims(rows),
        "ratios": ratios(rows),
        "sensitivity": sensitivity(trials),
        "rates": by_rate(trials),
        "models": by_model(trials, HYBRIDS[:2] if options.quick else HYBRIDS),
        "scale": at_scale(trials, options.quick),
    }
    report = rounded(report)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)
    draw(out.with_suffix(".png"), report)
    return 0


def rounded(value: Any) -> Any:
    """``value`` with floats of four digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
