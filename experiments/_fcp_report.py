"""Tables and the picture of ``fcp``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments._fcp_stacks import RESHUFFLED, SCATTERED
from experiments._fcp_summary import ORACLE, PUBLISHED_ABLATION, PUBLISHED_BAND

LABELS = {"forward": "forward", "backward": "backward", "both": "forward and backward"}
COLORS = {
    "fcp": "#c8502d",
    "fcp-pairs": "#e8a08a",
    RESHUFFLED: "#c8502d",
    SCATTERED: "#e8a08a",
    "grouping": "#2c5f9e",
    "ulysses": "#4fb0a8",
    ORACLE: "#222222",
    "zigzag-each": "#3c8c40",
    "document": "#8a4fb0",
    "magi": "#d6609f",
    "zigzag": "#b8a02c",
    "ring": "#999999",
}


def show(report: dict[str, Any]) -> None:
    """The figures as tables."""
    console = Console(width=140)
    for passes, name, by_size in _parts(report["scale"]):
        sizes = list(by_size)
        table = Table("attention MFU", *sizes, title=f"{LABELS[passes]}, {name} lengths, GPUs")
        for kind in COLORS:
            if any(kind in by_size[size] for size in sizes):
                table.add_row(kind, *(_mfu(by_size[size], kind) for size in sizes))
        over = report["ratios"][passes][name]
        table.add_row("fcp / oracle", *(f"{over[size]['over_oracle']:.2f}" for size in sizes))
        table.add_row("fcp / best of the paper's", *(f"{over[size]['over_paper']:.2f}" for size in sizes))
        table.add_row("fcp / best rival", *(f"{over[size]['over_best']:.2f}" for size in sizes))
        console.print(table)
    for name in report["breaks"]:
        for each in report["breaks"][name]:
            if each["workers"]:
                console.print(f"{each['kind']} breaks at {each['workers']} GPUs: {each['cause']}")
    for passes, name, by_size in _parts(report["stacks"]):
        table = Table(
            "MFU of all layers", *by_size, title=f"{LABELS[passes]}, {name}, log-normal lengths, GPUs"
        )
        for kind in dict.fromkeys(kind for found in by_size.values() for kind in found):
            table.add_row(kind, *(_mfu(found, kind) for found in by_size.values()))
        console.print(table)
    (by_variant,) = report["gradients"].values()
    table = Table("backward pass of fcp", "MFU", title="what travels")
    for variant, found in by_variant.items():
        table.add_row(variant, f"{found['mfu']:.3f}")
    console.print(table)
    table = Table("published", "figure", "here", "difference", "", title="arXiv 2605.08524")
    for each in report["claims"]:
        verdict = "comes out" if each["reproduced"] else "does not come out"
        table.add_row(
            each["claim"], each["published"], f"{each['here']:.2f}", f"{each['difference']:+.2f}", verdict
        )
    console.print(table)


def _parts(by_passes: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for passes, by_name in by_passes.items():
        for name, by_size in by_name.items():
            yield passes, name, by_size


def _mfu(found: dict[str, Any], kind: str) -> str:
    return f"{found[kind]['mfu']:.2f}" if kind in found else "-"


def draw(path: Path, report: dict[str, Any]) -> None:
    """Twelve panels: MFU by GPUs, ratios, ablation, context lengths, room, sensitivities, stacks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 18), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(4, 3).ravel()
    for row, (passes, by_name) in enumerate(report["scale"].items()):
        for axes, (name, by_size) in zip(panels[3 * row :], by_name.items()):
            _lines(axes, by_size)
            axes.set(title=f"attention MFU, {LABELS[passes]}\n{name} lengths", xlabel="GPUs")
    _ratios(panels[2], report["ratios"]["forward"])
    for way, axes in zip(report["ablation"]["kinds"], (panels[5], panels[6])):
        _ablation(axes, report["ablation"], way)
    _contexts(panels[7], report["context"])
    _room(panels[8], report["room"])
    for axes, (name, by_size) in zip(panels[9:11], report["stacks"]["both"].items()):
        _lines(axes, by_size)
        axes.set(title=f"MFU of all layers, {LABELS['both']}\n{name}, log-normal lengths", xlabel="GPUs")
    _sensitivity(panels[11], report["sensitivity"])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=9, frameon=False)
    figure.savefig(path)


def _lines(axes: Any, by_size: dict[str, Any]) -> None:
    for kind, color in COLORS.items():
        points = [(int(size), found[kind]["mfu"]) for size, found in by_size.items() if kind in found]
        if points:
            axes.plot(
                *zip(*points),
                color=color,
                marker="o",
                markersize=3.5,
                linewidth=2 if kind == "fcp" else 1.2,
                linestyle="--" if kind == ORACLE else "-",
                label=kind,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(size) for size in by_size], list(by_size))
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
    if RESHUFFLED in next(iter(by_size.values())):
        axes.legend(
            [line for line in axes.get_lines() if str(line.get_label()).startswith("fcp")],
            [RESHUFFLED, SCATTERED],
            frameon=False,
            fontsize=8,
        )


def _ratios(axes: Any, ratios: dict[str, Any]) -> None:
    for (name, by_size), color in zip(ratios.items(), ("#c8502d", "#2c5f9e")):
        sizes = [int(size) for size in by_size]
        for key, style, rivals in (
            ("over_oracle", "-", "rings, documents"),
            ("over_paper", ":", "these and MagiAttention"),
            ("over_best", "--", "all rivals"),
        ):
            axes.plot(
                sizes,
                [r[key] for r in by_size.values()],
                color=color,
                linestyle=style,
                marker="o",
                label=f"{name}: over {rivals}",
            )
    axes.axhspan(*PUBLISHED_BAND, color="#3c8c40", alpha=0.12, label="published, 1.13 to 2.21")
    axes.axhline(1, color="#666666", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(title="MFU of FCP over the best rival, forward", xlabel="GPUs", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _contexts(axes: Any, context: dict[str, Any]) -> None:
    for kind, color in COLORS.items():
        for begin, style in (("log-normal to ", "-"), ("all of ", ":")):
            points = [
                (int(name.rpartition(" ")[2]) // 1024, found[kind]["mfu"])
                for name, found in context.items()
                if name.startswith(begin) and kind in found
            ]
            if points:
                axes.plot(
                    *zip(*points), color=color, linestyle=style, marker="o", markersize=3, linewidth=1.2
                )
    axes.set_xscale("log", base=2)
    axes.set_xticks([128, 256, 512, 1024], ["128K", "256K", "512K", "1M"])
    axes.set(
        title="attention MFU, forward, by longest document\n(solid: log-normal to it; dotted: all as long)",
        xlabel="tokens",
        ylim=(0, 1),
    )
    axes.grid(alpha=0.25)


def _ablation(axes: Any, ablation: dict[str, Any], way: str) -> None:
    kinds = ablation["kinds"][way]
    names = list(kinds["fcp"])
    places = range(len(names))
    bars = [
        ("published, at 128", PUBLISHED_ABLATION[way], "#999999"),
        ("single blocks", [r["mfu"] for r in kinds["fcp"].values()], COLORS["fcp"]),
        ("pairs", [r["mfu"] for r in kinds["fcp-pairs"].values()], COLORS["fcp-pairs"]),
    ]
    for shift, (label, values, color) in zip((-0.27, 0, 0.27), bars):
        drawn = axes.bar([place + shift for place in places], values, 0.26, color=color, label=label)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.set_xticks(places, [name.replace(" ", "\n") for name in names], fontsize=8)
    axes.set(title=f"ablation, {LABELS[way]}, {ablation['workers']} GPUs", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)


def _room(axes: Any, room: dict[str, Any]) -> None:
    names = [name.removesuffix(".0").replace("inf", "all") for name in room]
    axes.plot(range(len(names)), [r["mfu"] for r in room.values()], color=COLORS["fcp"], marker="o")
    axes.set_xticks(range(len(names)), names)
    axes.set(
        title="FCP forward by room for others' keys and values",
        xlabel="blocks of 4,096 tokens at once",
        ylim=(0, 1),
    )
    axes.grid(alpha=0.25)


def _sensitivity(axes: Any, sensitivity: dict[str, Any]) -> None:
    base = sensitivity["base"]
    names = [each["constant"] for each in sensitivity["constants"]]
    for row, each in enumerate(sensitivity["constants"]):
        for key, shift, color in (("mfu", 0.2, COLORS["fcp"]), ("over_oracle", -0.2, "#2c5f9e")):
            for side, marker in (("lower", "<"), ("higher", ">")):
                value = each[side][key] / base[key] - 1
                axes.plot([0, 100 * value], [row + shift] * 2, color=color, linewidth=3, alpha=0.5)
                label = {"mfu": "MFU", "over_oracle": "over rings and documents"}[key]
                axes.plot(
                    100 * value,
                    row + shift,
                    color=color,
                    marker=marker,
                    linestyle="",
                    label=f"{label}, constant {side}" if row == 0 else None,
                )
    axes.set_yticks(range(len(names)), names)
    axes.axvline(0, color="#666666", linewidth=0.8)
    axes.set(
        title=f"constants 30 % lower and higher, {sensitivity['workers']} GPUs",
        xlabel="change of FCP's figure, %",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7)
