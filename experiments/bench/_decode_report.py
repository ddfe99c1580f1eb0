"""Tables and the chart of ``decode``."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(found: dict[str, Any]) -> None:
    """The figures as tables."""
    console = Console(width=120)
    table = Table("context", "policy", "keys", "ms/token", "dense", "bound", "MB/step", "held MB", "selected")
    for row in found["model"]:
        table.add_row(
            f"{row['context']:,}",
            row["policy"],
            row["dtype"],
            *(f"{row[key]:.2f}" for key in ("ms_per_token", "dense_ms_per_token", "bound_ms_per_token")),
            *(f"{row[key] / 1e6:.1f}" for key in ("bytes_per_step", "held_bytes")),
            f"{row['selected']:.3f}",
        )
    console.print(table)
    for row in found["layers"]:
        speed = ", ".join(f"{name} {value:.1f}x" for name, value in row["speedup"].items())
        share = ", ".join(f"{name} {value:.0%}" for name, value in row["select_share"].items())
        console.print(f"one layer at {row['context']:,}: {speed}; selecting, of dense attention: {share}")
    for row in found["maintenance"]:
        console.print(f"{row['policy']} maintenance at {row['context']:,}: {row['ms']:.1f} ms a layer")
    for row in found["peers"]:
        each = ", ".join(f"{name} {value:.1f}" for name, value in row["ms_per_token"].items())
        console.print(f"ms/token at {row['context']:,}: {each}")
        for name, reason in row["missing"].items():
            console.print(f"  {name}: not measured, {reason}")
    for row in found["prefill"]:
        console.print(f"prefill of {row['length']:,} tokens: {row['peak_bytes'] / 2**20:,.0f} MiB at most")
    for row in found["curves"]:
        for name, curve in row["curves"].items():
            for text in curve["texts"]:
                held, peak = (text[key] / 2**20 for key in ("held_bytes", "peak_bytes"))
                stored = (
                    f"stores at most {text['most_stored']:,}, holds {held:,.1f} MiB, peak {peak:,.0f} MiB"
                )
                console.print(f"{name}, text of {text['length']:,} tokens: {stored}")
    console.print(f"int4 pool: {found['pools']['int4_over_bfloat16']:.2f} times the tokens of bfloat16")


def draw(path: Path, found: dict[str, Any]) -> None:
    """Milliseconds a token over contexts, one line for each policy in bfloat16."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    rows = sorted(
        (row for row in found["model"] if row["dtype"] == "bfloat16"), key=lambda row: row["context"]
    )
    for name in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == name]
        ax.plot([r["context"] for r in mine], [r["ms_per_token"] for r in mine], marker="o", label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("ms per token")
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)
