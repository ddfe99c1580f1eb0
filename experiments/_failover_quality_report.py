"""What the runs of `experiments.failover_quality` come to: rows of its table, and its figure."""

import statistics
from pathlib import Path
from typing import Any


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model, rate and method: mean and spread over seeds, against no failure at the same seeds."""
    rows = []
    models = list(dict.fromkeys(run["model"] for run in runs))
    kinds = dict.fromkeys((run["model"], run["rate"], run["method"]) for run in runs)
    for model, rate, method in sorted(kinds, key=lambda kind: models.index(kind[0])):
        own = {r["seed"]: r for r in runs if (r["model"], r["rate"], r["method"]) == (model, rate, method)}
        base = {r["seed"]: r for r in runs if (r["model"], r["method"]) == (model, "no failure")}
        losses = [run["loss"] for run in own.values()]
        gaps = [run["loss"] - base[seed]["loss"] for seed, run in own.items() if seed in base]
        errors = [error for run in own.values() for _, error in run["errors"]]
        rows.append(
            {
                "model": model,
                "rate": rate,
                "method": method,
                "seeds": len(own),
                "degraded": statistics.fmean(run["degraded"] for run in own.values()),
                "loss": statistics.fmean(losses),
                "least": min(losses),
                "greatest": max(losses),
                "above_no_failure": statistics.fmean(gaps) if gaps else None,
                "gaps": gaps,
                "gradient_error": statistics.median(errors) if errors else None,
                "greatest_error": max(errors, default=None),
            }
        )
    return rows


def draw(runs: list[dict[str, Any]], rows: list[dict[str, Any]], workers: int, png: Path) -> None:
    """Gaps to no failure with their seeds, and validation loss over steps, for each model and rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["model"], row["rate"]) for row in rows if row["gaps"] and row["rate"]))
    figure = Figure(figsize=(12, 4.5 * len(panels)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for (model, rate), (left, right) in zip(panels, figure.subplots(len(panels), 2, squeeze=False)):
        own = [row for row in rows if (row["model"], row["rate"]) == (model, rate)]
        for place, row in enumerate(own):
            left.barh(place, row["above_no_failure"], color=_color(place), alpha=0.35)
            left.plot(row["gaps"], [place] * len(row["gaps"]), "o", color=_color(place), markersize=4)
        left.set_yticks(range(len(own)), [row["method"] for row in own], fontsize=8)
        left.invert_yaxis()
        left.axvline(0, color="#444444", linewidth=0.9)
        left.set(title=f"{model}, one of {workers} dead {rate:.0%} of the time")
        left.set(xlabel="nats per token above no failure at the end; a dot for each seed")
        # Those of one seed only are on the left.
        most = max(row["seeds"] for row in own)
        shown = [(place, row["method"], rate) for place, row in enumerate(own) if row["seeds"] == most]
        for place, method, when in [(None, "no failure", 0.0), *shown]:
            group = [r for r in runs if (r["model"], r["rate"], r["method"]) == (model, when, method)]
            lines = [dict(run["validation"]) for run in group]
            steps = list(lines[0])[1:]
            each = [[line[step] for line in lines] for step in steps]
            color = "#222222" if place is None else _color(place)
            right.plot(steps, [statistics.fmean(x) for x in each], color=color, linewidth=1.2, label=method)
            right.fill_between(steps, [min(x) for x in each], [max(x) for x in each], color=color, alpha=0.15)
        right.set(title="mean and range of seeds", xlabel="step", ylabel="validation loss, nats per token")
        right.legend(frameon=False, fontsize=8)
        for axes in (left, right):
            axes.grid(alpha=0.25)
    figure.savefig(png)


def _color(place: int) -> str:
    return f"C{place % 10}"
