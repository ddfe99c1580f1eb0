"""The picture of ``failover``, and its tables on the terminal."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from experiments.tables.failover import NAMES, failover

COLORS = {"undisturbed": "#3c8c40", "mecefo": "#c8502d", "restart": "#2c5f9e"}
# Intervals over which throughput is counted.
BINS = 60


def show(report: dict[str, Any]) -> None:
    """The figures as tables."""
    Console(width=150).print(Markdown(failover(report)))


def throughput(begun: list[list[float]], width: float) -> tuple[np.ndarray, np.ndarray]:
    """(middles of intervals, steps begun in each per second)."""
    times = np.array([row[0] for row in begun])
    edges = np.arange(0, times[-1] + width, width)
    counts, _ = np.histogram(times, edges)
    return (edges[:-1] + edges[1:]) / 2, counts / width


def losses(run: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(seconds, training loss) of the run's steps, at the last time that each was begun."""
    last = {step: seconds for seconds, step, _ in run["begun"]}
    points = [(last[step - 1], loss) for step, loss in run["loss"] if step - 1 in last]
    return [each[0] for each in points], [each[1] for each in points]


def draw(path: Path, report: dict[str, Any]) -> None:
    """Throughput, loss and progress over time; lines are failures, dotted ones the restarts of the baseline."""
    figure, (first, second, third) = plt.subplots(3, 1, figsize=(11, 11), sharex=True, layout="constrained")
    runs = report["runs"]
    width = max(run["seconds"] for run in runs.values()) / BINS
    for name, run in runs.items():
        style = {"color": COLORS[name], "label": NAMES[name], "linewidth": 1.2}
        first.plot(*throughput(run["begun"], width), **style)
        second.plot(*losses(run), **style)
        third.plot([row[0] for row in run["begun"]], [row[1] for row in run["begun"]], **style)
    for axes in (first, second, third):
        for each in report["failures"]:
            axes.axvline(each["time"] - runs["mecefo"]["first"], color=COLORS["mecefo"], linewidth=0.6)
        for each in runs.get("restart", {}).get("restarts", []):
            at = each["time"] - runs["restart"]["first"]
            axes.axvline(at, color=COLORS["restart"], linewidth=0.6, linestyle=":")
        axes.legend(fontsize=8)
    first.set(ylabel="steps begun per second", title="Four processes, killed and stopped")
    second.set(ylabel="training loss, nats/token")
    third.set(ylabel="step", xlabel="seconds since the first step")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
