"""Tables and the chart of ``long_context``."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments._long_context_cases import budget_label
from experiments._long_context_verdicts import TEXT

COLORS = {
    "dense": "#222222",
    "window": "#999999",
    "streaming": "#b8a02c",
    "quest": "#2c5f9e",
    "tactic": "#3c8c40",
    "pillar": "#8a4fb0",
    "rkv": "#c8502d",
    "rkv, importance only": "#e8a08a",
    "h2o": "#4fb0a8",
    "snapkv": "#b04f7c",
}


def show(found: dict[str, Any]) -> None:
    """The figures as tables."""
    console = Console(width=140)
    for name, model in found.items():
        title = f"{name}: {model['pattern']}, {model['parameters']:,} parameters"
        table = Table(
            *(
                "task",
                "context",
                "policy",
                "budget",
                "keys",
                "accuracy",
                "perplexity",
                "KL",
                "read",
                "recall",
                "MB held",
            ),
            title=title,
        )
        for row in model["rows"]:
            if not row["counted"]:
                continue
            table.add_row(
                row["task"],
                f"{row['length']:,}",
                row["policy"],
                _setting(row),
                row["dtype"],
                "-" if row["accuracy"] is None else f"{row['accuracy']:.0%}",
                f"{row['perplexity']:.3f}",
                f"{row['kl']:.4f}",
                f"{row['read']:.1%}",
                "-" if row["recall"] is None else f"{row['recall']:.1%}",
                f"{row['held_bytes'] / 1e6:.1f}",
            )
        console.print(table)
        if model["missing"]:
            console.print(f"{model['missing']} of {model['planned']} lines have not been measured yet")
        for each in model["left_out"]:
            console.print(
                f"not counted: {each['task']} {each['length']:,} at {each['budget']}: {each['reason']}"
            )
        for each in model["verdicts"]:
            console.print(f"{each['verdict']}: {each['claim']} ({len(each['figures'])} figures)")


def _setting(row: dict[str, Any]) -> str:
    return f"mass {row['setting']:g}" if row["policy"] == "tactic" else budget_label(row["setting"])


def draw(path: Path, found: dict[str, Any]) -> None:
    """Accuracy (of text, divergence) over what was read, a panel for each task and length, a line for each policy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = [
        (name, *place)
        for name, model in found.items()
        for place in dict.fromkeys((r["task"], r["length"]) for r in model["rows"] if r["policy"] != "dense")
    ]
    if not places:
        return
    columns = min(len(places), 3)
    lines = -(-len(places) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (name, task, length) in zip(panels, places):
        rows = [
            r
            for r in found[name]["rows"]
            if (r["task"], r["length"], r["dtype"]) == (task, length, "compute")
        ]
        value = "kl" if task == TEXT else "accuracy"
        for policy, color in COLORS.items():
            mine = sorted((r["read"], r[value]) for r in rows if r["policy"] == policy)
            if mine:
                axes.plot(*zip(*mine), color=color, marker="o", markersize=3.5, linewidth=1.2, label=policy)
        axes.set(xscale="log", title=f"{name}: {task}, {length:,}", xlabel="read, of all tokens before")
        if value == "kl":
            axes.set_yscale("symlog", linthresh=1e-4)
            axes.set_ylim(0, 2 * max(2e-4, *(r[value] for r in rows)))
            axes.set_ylabel("KL to dense, nats")
        else:
            axes.set_ylim(-0.03, 1.03)
            axes.set_ylabel("accuracy")
        axes.grid(alpha=0.25)
    for axes in panels[len(places) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, bbox_inches="tight")
