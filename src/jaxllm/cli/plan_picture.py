"""A plan of context parallelism as a picture: who holds what, who works how much, what travels when."""

from pathlib import Path

import numpy as np

from parallel.context import Plan

# Neighbouring documents' hues are this part of the circle apart, so that no two look alike.
_GOLDEN = 0.618034


def draw(path: Path, plan: Plan, *, title: str) -> Path:
    """Draw workers by rows: blocks coloured by document, their work, and what they receive in each round.

    Documents of one block, which never travel, are grey.

    Args:
        path: of the PNG.
        plan: what to draw.
        title: above the picture.

    Returns:
        ``path``.
    """
    # Not pyplot: it looks for a display, keeps figures alive and belongs to the user's session.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    workers, block = plan.capacity.workers, plan.capacity.block
    figure = Figure(figsize=(13, min(14, 2.5 + 0.22 * workers)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    places, works, rounds = figure.subplots(1, 3, sharey=True, width_ratios=(5, 1.5, 5))
    colours = _document_colours(plan)
    arrays = plan.arrays
    worker, column = np.nonzero(arrays.length)
    left = arrays.slot[worker, column] + arrays.offset[worker, column] / block
    width = arrays.length[worker, column] / block
    boxes = [Rectangle((x, y - 0.42), w, 0.84) for x, y, w in zip(left, worker, width)]
    places.add_collection(
        PatchCollection(
            boxes,
            facecolors=list(colours[arrays.document[worker, column]]),
            edgecolors="white",
            linewidths=0.4,
        )
    )
    places.set(xlim=(0, plan.capacity.slots), ylim=(workers - 0.5, -0.5), xlabel="slot", ylabel="worker")
    places.set_title("blocks, coloured by document", fontsize=10)

    work = np.bincount(plan.placement.worker, plan.blocks.work, workers)
    works.barh(np.arange(workers), work / work.mean(), height=0.84, color="#9db8d9")
    works.axvline(1, color="#c8502d", linewidth=1)
    works.set_xlabel("work / mean")
    works.set_title(f"at most {plan.balance.work_over_mean:.3f}", fontsize=10)

    shown = np.ones((workers, max(1, plan.balance.rounds), 3))
    shown[plan.moves.receiver, plan.rounds] = colours[plan.blocks.document[plan.moves.block]]
    rounds.imshow(
        shown, aspect="auto", interpolation="nearest", extent=(0, shown.shape[1], workers - 0.5, -0.5)
    )
    rounds.set_xlabel("round")
    rounds.set_title(
        f"blocks received: {plan.balance.transfers:,} in {plan.balance.rounds:,} rounds", fontsize=10
    )
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _document_colours(plan: Plan) -> np.ndarray:
    """f64[documents, 3]: red, green and blue."""
    from matplotlib.colors import hsv_to_rgb

    several = np.bincount(plan.blocks.document) > 1
    number = np.cumsum(several)
    hue = (number * _GOLDEN) % 1
    value = 0.65 + 0.25 * (number % 3) / 2
    rgb = hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.6), value], axis=-1))
    return np.where(several[:, None], rgb, 0.75)
