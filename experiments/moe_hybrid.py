"""A mixture-of-experts hybrid beside a dense one of the same active parameters, on the quickstart corpus.

    python experiments/moe_hybrid.py            # about 30 minutes on two cores
    python experiments/moe_hybrid.py --quick    # half a minute: tiny models, to see that it runs

Expected: with a bias rate of 0.02 the busiest expert of the worst layer ends below 1.5 times the mean load. The published
rate, 1e-3, is meant for runs a thousand times as long and is still on its way (about 3); without balancing the load stays
at its worst possible (4). At the same tokens the losses lie within a hundredth or two of each other.

Four runs on the same batches: dense, mixture with the correction bias and the sequence-wise loss (arXiv 2408.15664,
2412.19437) at the published rate and at one that suits so short a run, mixture without either. It takes up where it
stopped (runs/moe_hybrid), and draws loss and load into one picture beside the figures in experiments/results/.
"""

import argparse
import datetime
import json
import platform
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxllm import ModelConfig, MoEConfig, preset
from jaxllm.cli.display import make_console
from jaxllm.cli.model_parts import active_parameter_count, parameter_count
from jaxllm.cli.precision import device_precision
from jaxllm.cli.training_display import TrainingDisplay
from jaxllm.cli.training_events import Watcher
from jaxllm.cli.validation import Validation
from jaxllm.data.loader import Loader
from jaxllm.data.prepare import PreparedData, prepare_data
from jaxllm.train.optim import OptimConfig
from jaxllm.train.placement import placement
from jaxllm.train.settings import TrainSettings
from jaxllm.train.step import StepSettings
from jaxllm.train.trainer import fit
from jaxllm.train.writers import read_jsonl

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
EXPERTS, TOP_K = 8, 2


def models(quick: bool, vocabulary: int) -> dict[str, tuple[ModelConfig, StepSettings]]:
    """The contenders; experts are as wide as makes ``TOP_K`` of them the dense MLP."""
    dense = preset("quickstart").replace(vocab_size=vocabulary, precision=device_precision())
    if quick:
        dense = dense.replace(hidden_size=64, pattern="M-*-")
    assert dense.mlp is not None
    width = dense.mlp.intermediate_size // TOP_K
    moe = MoEConfig(num_experts=EXPERTS, top_k=TOP_K, intermediate_size=width)
    mixture = dense.replace(pattern=dense.pattern.replace("-", "E"), moe=moe)
    unbalanced = StepSettings(balance_loss=0.0, bias_rate=0.0)
    return {
        "dense": (dense, StepSettings()),
        "mixture": (mixture, StepSettings()),
        "mixture, bias rate 0.02": (mixture, StepSettings(bias_rate=0.02)),
        "mixture, not balanced": (mixture, unbalanced),
    }


def run(
    name: str, cfg: ModelConfig, step: StepSettings, data: PreparedData, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one contender (or take it up) and measure it."""
    folder = options.runs / name.replace(", ", "-").replace(" ", "-")
    optim = replace(OptimConfig(), lr=3e-3, warmup_steps=min(100, options.steps // 10))
    loader = Loader(data.train, options.rows, options.length, seed=0)
    validation = Validation(
        cfg,
        data.validation,
        data.tokenizer,
        batch_size=options.rows,
        seq_len=options.length,
        part=16384,
        place=placement(cfg),
    )
    settings = TrainSettings(
        steps=options.steps,
        step=step,
        eval_every=max(1, options.steps // 8),
        save_every=max(1, options.steps // 4),
    )
    console = make_console()
    console.print(f"\n{name}: {cfg.pattern}")
    display = TrainingDisplay(console, validation.bits_per_nat)
    with display:
        result = fit(
            cfg,
            optim,
            loader,
            settings,
            folder=folder,
            evaluate=validation.partial,
            callbacks=[Watcher(display, None)],
        )
    loader.close()
    if result.interrupted is not None:
        raise SystemExit("Stopped; the same command goes on.")
    rows = read_jsonl(folder / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    loads = [row["imbalance"] for row in train if row.get("imbalance")]
    last = loads[-max(1, len(loads) // 10) :]
    return {
        "name": name,
        "pattern": cfg.pattern,
        "parameters": parameter_count(cfg),
        "active_parameters": active_parameter_count(cfg),
        "tokens": result.tokens_seen,
        "seconds": result.elapsed,
        "validation_loss": validation.whole(result.params),
        "imbalance_at_the_end": statistics.median(last) if last else None,
        "train": [[row["step"], row["loss"]] for row in train],
        "validation": [[row["step"], row["validation_loss"]] for row in rows if row["kind"] == "eval"],
        "imbalance": [[row["step"], row["imbalance"]] for row in train if row.get("imbalance")],
    }


def draw(results: list[dict[str, Any]], png: Path) -> None:
    """Losses above, load of the busiest expert below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for result, color in zip(results, ("#444444", "#2c5f9e", "#3c8c40", "#c8502d")):
        label = f"{result['name']}: {result['active_parameters'] / 1e6:.1f} M active"
        upper.plot(*zip(*result["train"]), color=color, linewidth=0.5, alpha=0.4)
        upper.plot(*zip(*result["validation"]), color=color, marker="o", markersize=3.5, label=label)
        if result["imbalance"]:
            lower.plot(*zip(*result["imbalance"]), color=color, linewidth=0.8, label=result["name"])
    lower.axhline(1.5, color="#666666", linewidth=0.9, linestyle="--", label="aim at the end")
    upper.set(ylabel="nats per token")
    lower.set(xlabel="step", ylabel="busiest expert / mean load", yscale="log")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps; writes no results")
    parser.add_argument("--steps", type=int, help="training steps of each (400; --quick 12)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (runs/moe_hybrid)")
    options = parser.parse_args()
    options.steps = options.steps or (12 if options.quick else 400)
    options.rows, options.length = (2, 64) if options.quick else (8, 256)
    options.runs = options.runs or ROOT / "runs" / ("moe_hybrid_quick" if options.quick else "moe_hybrid")
    data = prepare_data("stdlib", vocab_size=512 if options.quick else 4096)
    vocabulary = -(-data.tokenizer.vocab_size // 64) * 64
    results = [
        run(name, cfg, step, data, options) for name, (cfg, step) in models(options.quick, vocabulary).items()
    ]
    table = Table("model", "parameters", "active", "tokens/s", "validation, nats", "busiest / mean load")
    for result in results:
        load = result["imbalance_at_the_end"]
        table.add_row(
            result["name"],
            f"{result['parameters']:,}",
            f"{result['active_parameters']:,}",
            f"{result['tokens'] / result['seconds']:,.0f}",
            f"{result['validation_loss']:.3f}",
            "-" if load is None else f"{load:.2f}",
        )
    Console().print(table)
    target = options.runs if options.quick else RESULTS
    report = {
        "command": f"python experiments/moe_hybrid.py --steps {options.steps}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": {
            "rows": options.rows,
            "tokens": options.length,
            "steps": options.steps,
            "corpus": data.corpus.name,
        },
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "results": results,
    }
    (target / "moe_hybrid.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    draw(results, target / "moe_hybrid.png")


if __name__ == "__main__":
    main()
