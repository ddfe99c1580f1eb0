"""The closing table and the chart."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STYLE = {"we lose": "red", "below the aim": "yellow", "meets the aim": "green", "ahead": "green"}


def _number(value: float | None, form: str = ",.0f", missing: str = "-") -> str:
    return missing if value is None else format(value, form)


def print_report(console: Console, result: dict[str, Any]) -> None:
    """Figures against peers and bounds, then failures, start-up and memory."""
    table = Table(
        title=f"tokens/s on {result['device']['cpu']}, {result['inputs']['threads']} threads; medians"
    )
    for name in (
        "model",
        "task",
        "group",
        "jaxllm",
        "its best",
        "peer",
        "its best",
        "ratio",
        "aim",
        "bound",
        "share",
    ):
        table.add_column(name, justify="left" if name in ("model", "task", "group", "its best") else "right")
    table.add_column("verdict")
    for line in result["comparisons"]:
        style = STYLE.get(line["verdict"], "")
        table.add_row(
            line["model"],
            line["task"],
            line["group"],
            _number(line["tokens_per_second"]),
            line["ours"].removeprefix("jaxllm "),
            _number(line["peer_tokens_per_second"]),
            line["peer"] or f"{line['peer_library']}: none",
            _number(line["ratio"], ".2f"),
            _number(line["aim"], ".0f"),
            _number(line["bound"]),
            _number(line["bound_share"], ".0%")
            + (f" of {line['bound_aim']:.0%}" if line["bound_aim"] else ""),
            f"[{style}]{line['verdict']}[/]" if style else line["verdict"],
        )
    console.print(table)
    console.print(
        "group fp32: both in float32; best: each at its best precision. bound: training and prefill from a measured "
        "product at the model's own shapes, decode from a measured stream over its bytes; share: our figure of it."
    )
    for library, reason in result["missing"].items():
        console.print(f"{library}: not measured, {reason}")
    for row in result["rows"]:
        for name, entry in row["contenders"].items():
            if entry.get("error"):
                console.print(f"{row['model']} {row['name']}, {name}: {entry['error']}", markup=False)
    _print_startup(console, result)
    lost = [line for line in result["comparisons"] if line["verdict"] == "we lose"]
    console.print(f"rows where we lose: {len(lost)} of {len(result['comparisons'])}")


def _print_startup(console: Console, result: dict[str, Any]) -> None:
    startup = result.get("startup")
    if startup:
        ours, theirs = startup["import_jaxllm_seconds"], startup["import_transformers_seconds"]
        step = startup["import_to_first_step_seconds"]
        console.print(
            f"import jaxllm {_number(ours and ours['median'], '.2f')} s"
            f" (transformers' model class {_number(theirs and theirs['median'], '.2f')} s);"
            f" process start to first trained step {step['warm']['median']:.2f} s with a warm compilation cache"
            f" (aim {step['aim']:.0f} s), {step['cold']:.2f} s with a cold one"
        )
    for row in result["rows"]:
        if row["task"]["kind"] == "train":
            peaks = [
                f"{name} {entry['peak_rss_mib']:,.0f}"
                for name, entry in row["contenders"].items()
                if entry.get("peak_rss_mib") and entry["library"] != "machine"
            ]
            console.print(f"peak RSS in MiB, {row['model']} {row['name']}: {', '.join(peaks)}")


def draw(path: Path, result: dict[str, Any]) -> bool:
    """Bars of every ratio, aims as lines; False where there is no ratio to draw."""
    lines = [line for line in result["comparisons"] if line["ratio"] is not None]
    if not lines:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"transformers": "#3b6ea5", "jla": "#8c6bb1"}
    fig, ax = plt.subplots(figsize=(9, 0.9 + 0.27 * len(lines)), layout="constrained")
    for y, line in enumerate(lines):
        ax.barh(
            y,
            line["ratio"],
            color="#c0392b" if line["ratio"] < 1 else colours[line["peer_library"]],
            height=0.7,
        )
        ax.text(line["ratio"] * 1.03, y, f"{line['ratio']:.1f}", va="center", fontsize=7)
        if line["aim"]:
            ax.plot([line["aim"]] * 2, [y - 0.45, y + 0.45], color="black", lw=1.6)
    names = [f"{line['model']} {line['task']} {line['group']} / {line['peer_library']}" for line in lines]
    ax.set_yticks(range(len(lines)), names, fontsize=7)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.axvline(1, color="grey", lw=0.8)
    ax.set_xlabel("jaxllm's tokens/s over the peer's best (log scale); black lines: aims; red: we lose")
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return True
