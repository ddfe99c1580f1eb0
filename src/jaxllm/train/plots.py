"""The loss curve as a picture."""

from pathlib import Path

from jaxllm.train.writers import read_jsonl


def loss_curve(metrics_jsonl: Path | str, png: Path | str, *, title: str = "") -> Path:
    """Draw training loss, and every evaluated value whose name holds "loss", over steps; below, the experts' imbalance.

    Args:
        metrics_jsonl: written by :class:`jaxllm.train.writers.JsonlWriter`.
        png: picture to write.
        title: above the picture.

    Raises:
        ValueError: the file has no finished step.
    """
    rows = read_jsonl(Path(metrics_jsonl))
    train = [(r["step"], r["loss"]) for r in rows if r["kind"] == "train" and r.get("loss") is not None]
    if not train:
        raise ValueError(f"metrics_jsonl={str(metrics_jsonl)!r}: no training step in it yet")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loads = [(r["step"], r["imbalance"]) for r in rows if r["kind"] == "train" and r.get("imbalance")]
    figure = Figure(figsize=(7, 6 if loads else 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, *below = figure.subplots(2 if loads else 1, squeeze=False)[:, 0]
    for lower in below:
        lower.plot(*zip(*loads), linewidth=1)
        lower.set(xlabel="step", ylabel="busiest expert / mean load")
        lower.grid(alpha=0.3)
    axes.plot(*zip(*train), linewidth=1, label="train")
    names = sorted({n for r in rows if r["kind"] == "eval" for n in r if "loss" in n})
    for name in names:
        points = [(r["step"], r[name]) for r in rows if r["kind"] == "eval" and r.get(name) is not None]
        axes.plot(*zip(*points), marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(str(png))
    return Path(png)
