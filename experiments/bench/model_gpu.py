"""Whole training steps and whole decoding on a GPU: utilisation, and share of the bounds measured in the same run.

Command:  python -m experiments.bench.model_gpu --out FILE [--only TEXT] [--minutes 9] [--fresh]
          python -m experiments.bench.model_gpu --quick        (tiny models through XLA, on a CPU too)
Time:     under 9 minutes on an H200, most of it compilation; --quick about 30 seconds on two CPU cores.
Expected: at least 45 % of the data sheet's bfloat16 FLOP/s in training the MoE hybrid, and more than 598 output tokens
          a second for Nemotron 3 Nano's shape with 32,768 tokens in and 1,024 out (64 rows at once). Both are aims, not
          yet measured.

Models of 1.5 to 2.7 billion parameters (``M*-E``, ``M-*`` and dense) take training steps of 16,384 tokens; the shapes of
Nemotron 3 Nano and Jet-Nemotron 2B read prompts and decode with 1 to 256 rows. Weights are random. Every op is told its
implementation; nothing is left to ``auto``. A row whose memory would not fit is not tried, and one that fails is a row
with its error; a bound that cannot be measured leaves its shares out. With ``--out`` each row is written as it ends and the next run goes on from there: a row during which the
process died is not tried again. PNG beside the JSON. Without a GPU: exit code 2.
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments.bench import _kernels_gpu
from experiments.bench._model_runs import KINDS, measure
from experiments.bench._model_work import PEAKS, Row, models, rows
from jaxllm.cli import machine
from pallas_kernels import compat
from pallas_kernels.target import target

RUNNING = "the process ended during this row"


def room() -> int | None:
    """Bytes that this process may take of the first device; None where it does not tell."""
    found = jax.devices()[0].memory_stats() or {}
    return found.get("bytes_limit")


def shares(row: Row, found: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What a row's figures are of the bounds that were reached, and whether its aims are met."""
    reached, peak = data["bounds"], data["peak_flops_per_s"]
    more: dict[str, Any] = {}
    if "flops_per_s" in reached:
        more["product_share"] = found["flops_per_s"] / reached["flops_per_s"]
    if peak is not None:
        more["mfu"] = found["flops_per_s"] / peak
    if row.kind == "decode":
        if "bytes_per_s" in reached:
            more["byte_share"] = found["bytes_per_s"] / reached["bytes_per_s"]
        prompt = next(
            (
                known["seconds"]
                for known in data["rows"].values()
                if (known["kind"], known["model"], known["length"]) == ("prefill", row.model, row.length)
                and "seconds" in known
            ),
            None,
        )
        if prompt is not None:
            # One prompt after the other, then all answers at once.
            whole = row.batch * prompt + row.new * found["seconds"]
            more["output_tokens_per_s"] = row.batch * row.new / whole
    aims = {name: {"least": least, "met": (found | more).get(name, 0.0) >= least} for name, least in row.aims}
    return more | ({"aims": aims} if aims else {})


def describe(row: dict[str, Any]) -> list[str]:
    """The cells of a row."""
    if "error" in row:
        return [row["name"], row["error"], *[""] * 5]
    percent = [f"{row[key]:.1%}" if key in row else "-" for key in ("mfu", "product_share", "byte_share")]
    output = f"{row['output_tokens_per_s']:,.0f}" if "output_tokens_per_s" in row else "-"
    aims = [
        f"{name} >= {aim['least']:g}: {'met' if aim['met'] else 'missed'}"
        for name, aim in row.get("aims", {}).items()
    ]
    return [row["name"], f"{row['tokens_per_s']:,.0f}", *percent, output, ", ".join(aims)]


def draw(found: list[dict[str, Any]], png: Path) -> None:
    """Share of what bounds each row: FLOP/s in training and prefill, bytes in decoding."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bounds = {kind: "byte_share" if kind == "decode" else "product_share" for kind in KINDS}
    found = [row for row in found if bounds[row["kind"]] in row]
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(found)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, row in enumerate(found):
        share = 100 * row[bounds[row["kind"]]]
        axes.barh(y, share, color="#3b6ea5" if row["kind"] == "decode" else "#3c8c40")
        axes.text(share, y, f" {row['tokens_per_s']:,.0f} tokens/s", va="center", fontsize=7)
    axes.set_yticks(range(len(found)), [row["name"] for row in found], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("% of the FLOP/s (green) or bytes/s (blue) measured on the device in the same run")
    axes.grid(alpha=0.25, axis="x")
    figure.savefig(png)


class Record:
    """What is measured so far, on disk where there is a file."""

    def __init__(self, file: Path | None, mark: dict[str, Any], fresh: bool):
        self.file = file
        self.data: dict[str, Any] = {"mark": mark, "rows": {}}
        if file is not None and file.is_file() and not fresh:
            known = json.loads(file.read_text(encoding="utf-8"))
            self.data = known if known.get("mark") == mark else self.data

    def put(self, name: str, row: dict[str, Any]) -> None:
        self.data["rows"][name] = row
        self.save()

    def save(self) -> None:
        """Write, whole or not at all."""
        if self.file is None:
            return
        self.data["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.file)


def run(plan: list[Row], record: Record, seconds: float, quick: bool, console: Console) -> None:
    """Measure the rows that the record lacks, as long as there is time."""
    begin, configs = time.perf_counter(), models(quick)
    limit = room()
    for row in plan:
        if row.name in record.data["rows"]:
            continue
        if time.perf_counter() - begin > seconds:
            console.print(f"out of time: {row.name} and what follows is left to the next run")
            return
        known = {"name": row.name, "kind": row.kind, "model": row.model, "batch": row.batch}
        known |= {"length": row.length, "new": row.new, "implementations": row.implementations()}
        record.put(row.name, known | {"error": RUNNING})
        found = measure(row, configs[row.model], limit, 1 if quick else 3)
        if "error" not in found:
            found |= shares(row, found, record.data)
        record.put(row.name, known | found)
        console.print(" | ".join(describe(known | found)[:2]))


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code: 0, or 2 where there is nothing to measure on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--out", type=Path, help="JSON file; a PNG is drawn beside it")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row is begun after as many")
    parser.add_argument("--fresh", action="store_true", help="measure again what FILE holds")
    options = parser.parse_args(argv)
    console = Console(width=150)
    # Read when the device is opened: without it a quarter of the memory stays out of reach.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    device = target()
    if not options.quick and device.capability != (9, 0):
        console.print(
            f"Nothing to measure: this is made for a Hopper GPU (H100, H200), and the device is {device.kind}. "
            "--quick shows that the programs run, on any device."
        )
        return 2
    plan = [row for row in rows(options.quick) if options.only in row.name]
    if not plan:
        console.print(
            f"--only {options.only!r}: rows are {', '.join(row.name for row in rows(options.quick))}"
        )
        return 2
    mark = {"device": device.kind, "versions": machine.versions(), "quick": options.quick}
    record = Record(options.out, mark, options.fresh)
    if "bounds" not in record.data or "errors" in record.data["bounds"]:
        size, megabytes = (256, 4) if options.quick else (8192, 2048)
        record.data["bounds"] = _kernels_gpu.bounds(11, size, megabytes)
        kind = next((name for name in sorted(PEAKS, key=len, reverse=True) if name in device.kind), None)
        record.data["peak_flops_per_s"] = PEAKS.get(kind) if kind else None
        record.data["jax"] = compat.JAX
        for row in plan:
            # Rows of a run that did not reach the bounds.
            known = record.data["rows"].get(row.name, {"error": RUNNING})
            if "error" not in known:
                record.data["rows"][row.name] = known | shares(row, known, record.data)
    run(plan, record, 60 * options.minutes, options.quick, console)
    found = [record.data["rows"][row.name] for row in plan if row.name in record.data["rows"]]
    table = Table("row", "tokens/s", "MFU", "of a product", "of the bytes", "output tokens/s", "aims")
    for row in found:
        table.add_row(*describe(row))
    console.print(table)
    reached = record.data["bounds"]
    for name, text, unit in (("flops_per_s", "a product", "TFLOP/s"), ("bytes_per_s", "a copy", "GB/s")):
        if name in reached:
            amount = reached[name] / (1e12 if name == "flops_per_s" else 1e9)
            console.print(f"{device.kind}: {text} reaches {amount:,.2f} {unit}")
        else:
            console.print(f"{device.kind}: what {text} reaches is not known ({reached['errors'][name]})")
    if options.out is not None:
        record.save()
        draw(found, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
