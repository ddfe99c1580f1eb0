"""The loss curve of a run as a picture."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

from jaxllm.train.writers import read_jsonl

Points = Sequence[tuple[float, float]]


def read_points(metrics: Path, tokens_per_step: int) -> dict[str, list[tuple[float, float]]]:
    """``loss``, ``validation_loss`` and ``imbalance`` of a run over tokens seen; empty where it has none."""
    rows = read_jsonl(metrics)
    return {
        kind: [(float(row["step"] * tokens_per_step), row[kind]) for row in rows if row.get(kind) is not None]
        for kind in ("loss", "validation_loss", "imbalance")
    }


def draw(
    path: Path,
    train: Points,
    validation: Points,
    *,
    title: str,
    loads: Points = (),
    bits_per_nat: float | None = None,
    lines: Mapping[str, float] | None = None,
) -> Path:
    """Draw losses over tokens seen, and the imbalance of experts below them.

    Args:
        path: of the PNG.
        train: (tokens seen, nats per token).
        validation: (tokens seen, nats per token).
        title: above the picture.
        loads: (tokens seen, load of the busiest expert over the mean); none: no panel of theirs.
        bits_per_nat: bits per byte of one nat per token; adds the second scale.
        lines: horizontal lines by label, in nats per token.

    Returns:
        ``path``.
    """
    # Not pyplot: it looks for a display, keeps figures alive and belongs to the user's session.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5 if loads else 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, *below = figure.subplots(2 if loads else 1, squeeze=False)[:, 0]
    for lower in below:
        lower.plot(*zip(*loads), color="#2c5f9e", linewidth=1)
        lower.set(xlabel="tokens seen", ylabel="busiest expert / mean load")
        lower.grid(alpha=0.25)
    if train:
        axes.plot(*zip(*train), color="#9db8d9", linewidth=1, label="training")
        axes.plot(*zip(*_smooth(train)), color="#2c5f9e", linewidth=1.6, label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation), color="#c8502d", marker="o", markersize=3.5, label="validation")
    for (label, value), style in zip((lines or {}).items(), ("--", "-.", ":", (0, (5, 1)))):
        axes.axhline(value, color="#666666", linewidth=0.9, linestyle=style, label=label)
    axes.set(title=title, xlabel="tokens seen", ylabel="nats per token")
    axes.grid(alpha=0.25)
    if train or validation or lines:
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    if bits_per_nat:
        second = axes.secondary_yaxis("right", functions=_scales(bits_per_nat))
        second.set_ylabel("bits per byte")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _scales(factor: float) -> Any:
    """The second axis from the first, and back."""
    return lambda nats: nats * factor, lambda bits: bits / factor


def bits_per_nat(scored_tokens: int, scored_bytes: int) -> float:
    """Bits per byte of one nat per token, on a text of so many tokens and bytes."""
    return scored_tokens / (log(2) * scored_bytes)


def _smooth(points: Points, horizon: int = 20) -> Points:
    """Exponential mean with the bias of its start removed."""
    keep, mean, weight, smoothed = 1 - 1 / horizon, 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append((x, mean / weight))
    return smoothed
