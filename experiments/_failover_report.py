"""The picture of ``failover_simulator``, and its tables on the terminal."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.markdown import Markdown

from experiments.tables.failover import failover_simulator

COLORS = {
    "MeCeFO": "#c8502d",
    "Bamboo-like": "#3c8c40",
    "Oobleck-like": "#2c5f9e",
    "checkpoint-restart": "#999999",
    "drop the replica": "#8a4fb0",
}
SHADES = {4: "#e8a08a", 8: "#c8502d", 16: "#702010"}


def show(report: dict[str, Any]) -> None:
    """The figures as tables."""
    Console(width=150).print(Markdown(failover_simulator(report)))


def draw(path: Path, report: dict[str, Any]) -> None:
    """Four panels: drops by micro-batches, by rate, by model, by size of the cluster."""
    figure, ((first, second), (third, fourth)) = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    _by_micro(first, report)
    _bars(second, report["rates"], "rate", "drop by published rate, 7B")
    for row in report["models"]:
        color = "#e8a08a" if row["policy"] == "attention" else "#c8502d"
        label = f"{row['model']}\nskips {row['skips'] or 'nothing'}, c = {row['pair']:.2f}"
        third.barh(label, row["micro 8"]["drop"], xerr=row["micro 8"]["error"], color=color)
    third.invert_yaxis()
    third.set(title="MeCeFO by model, high rate, 8 micro-batches", xlabel="drop, %")
    scale = [{**row, "rate": f"{row['workers']}, {row['rate']}"} for row in report["scale"]]
    _bars(fourth, scale, "rate", "high rate of the cluster, or of each worker")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _by_micro(axes: Any, report: dict[str, Any]) -> None:
    for schedule, style in (("gpipe", "-"), ("1f1b", "--")):
        for stages in sorted({row["stages"] for row in report["grid"]}):
            line = [
                row
                for row in report["grid"]
                if (row["size"], row["stages"], row["schedule"]) == ("7B", stages, schedule)
            ]
            axes.errorbar(
                [row["micro"] for row in line],
                [row["MeCeFO"]["drop"] for row in line],
                [row["MeCeFO"]["error"] for row in line],
                color=SHADES[stages],
                linestyle=style,
                label=f"{stages} stages, {schedule}",
            )
    for size, each in report["published"].items():
        axes.axhline(each["drops"][2], color="#222222", linewidth=0.8, linestyle=":")
        axes.annotate(size, (1, each["drops"][2]), fontsize=8)
    axes.set(
        xscale="log",
        xlabel="micro-batches of a replica",
        ylabel="drop, %",
        title="MeCeFO 7B, high rate; dotted: published",
    )
    axes.legend(fontsize=8)


def _bars(axes: Any, rows: list[dict[str, Any]], group: str, title: str) -> None:
    groups, names = list(dict.fromkeys(row[group] for row in rows)), list(COLORS)
    for place, name in enumerate(names):
        chosen = [row for row in rows if row["system"] == name]
        at = [groups.index(row[group]) + place / (len(names) + 1) for row in chosen]
        axes.bar(
            at,
            [row["drop"] for row in chosen],
            1 / (len(names) + 1),
            yerr=[row["error"] for row in chosen],
            color=COLORS[name],
            label=name,
        )
    axes.set_xticks([n + 0.33 for n in range(len(groups))], groups, fontsize=8)
    axes.set(title=title, ylabel="drop, %")
    axes.legend(fontsize=8)
