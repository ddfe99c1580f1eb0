"""Train small models that need the far past, for the long-context experiments: all attention, and a hybrid.

    python experiments/train_long_context.py --kind attention   # 20 minutes on one core, measuring included
    python experiments/train_long_context.py --kind hybrid      # the same
    python experiments/train_long_context.py --quick            # a minute or two: tiny models, to see that it runs

Rows of the tasks of ``long_tasks.py`` and of the standard library's source, a byte per token, first 64 tokens long and
last 2048. The folder is written through the library in bfloat16 (``experiments/checkpoints/KIND``), read back with
``jaxllm.load``, and measured by greedy decoding at contexts of 512 to 8192 characters; curves and accuracies go to
``experiments/results/train_long_context.json`` and ``.png``, one model beside the other. A run that was stopped goes on
with the exact next batch.

Expected: within 300 steps the value of a key that was told is known at rows of 64 tokens; the longer rows carry that to
contexts that tell it once. Both models do arithmetic without an error up to the length of their rows: texts of few letters
come as often as those of many, since whoever looks up the digits of few soon looks up those of all (with 26 in every text
models learned to add, but never to look up), and half of the texts hold all 26, since else nobody learns when they begin
anew. The hybrid recalls up to four times the length of its longest rows. The attention model's curve of recall stays near
0.65 all the same: it also counts the letter that follows a known capital, and that one is not learned.
"""

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxllm
from experiments.long_batches import KINDS, CurriculumBatches, Stage, batch_of, byte_tokenizer, document_row
from experiments.long_scores import accuracy, bits_per_byte
from experiments.long_tasks import TASKS
from jaxllm import AttentionConfig, LanguageModel, MambaConfig, MLPConfig, ModelConfig, RopeConfig, hf
from jaxllm.cli.display import make_console
from jaxllm.cli.model_parts import parameter_count
from jaxllm.cli.precision import device_precision
from jaxllm.cli.training_display import TrainingDisplay
from jaxllm.cli.training_events import Watcher
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.train.optim import OptimConfig
from jaxllm.train.settings import TrainSettings
from jaxllm.train.step import make_eval_step
from jaxllm.train.trainer import fit
from jaxllm.train.writers import read_jsonl

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
CHECKPOINTS = ROOT / "experiments" / "checkpoints"
LARGEST = 5_000_000
# Peak learning rate; at twice that the hybrid stays for a thousand steps where the decay then takes it on.
RATE = 1.5e-3


def models(quick: bool = False) -> dict[str, ModelConfig]:
    """The architectures; both fit a format that transformers reads (Llama, Nemotron-H)."""
    width = 32 if quick else 192
    heads = (
        dict(num_heads=2, num_kv_heads=1, head_dim=16)
        if quick
        else dict(num_heads=4, num_kv_heads=2, head_dim=64)
    )
    attention = ModelConfig(
        vocab_size=288,
        hidden_size=width,
        pattern="W-*-" if quick else "W-*-*-*-",
        # The window gives the first layer the neighbourhood that recall starts from.
        attention=AttentionConfig(**heads, rope=RopeConfig(theta=500000.0), qk_norm=True, window=8),
        mlp=MLPConfig(64 if quick else 384, "swiglu"),
        norm_cast="first",
        tie_embeddings=True,
        # Wider than usual: at this width and so few steps attention has to tell tokens apart from the start.
        init_std=0.04,
        precision=device_precision(),
    )
    mamba = MambaConfig(
        num_heads=2 if quick else 3,
        head_dim=16 if quick else 64,
        state_size=16 if quick else 32,
        chunk_size=64,
    )
    hybrid = attention.replace(
        pattern="M-*-" if quick else "M-*-M-*-",
        attention=AttentionConfig(**heads),
        mamba=mamba,
        mlp=MLPConfig(64 if quick else 768, "relu2"),
        norm_cast="last",
        tie_embeddings=False,
    )
    return {"attention": attention, "hybrid": hybrid}


def curriculum(quick: bool) -> tuple[Stage, ...]:
    """Short rows first: where the keys are near and the questions many, looking back is learned soonest."""
    if quick:
        return (Stage(128, 2, 3, (1.0, 0.0, 0.0)), Stage(256, 2, 3, (0.4, 0.3, 0.3)))
    mix = (0.35, 0.55, 0.1)
    return (
        Stage(64, 32, 300, (0.7, 0.3, 0.0)),
        Stage(256, 8, 800, mix),
        Stage(512, 4, 300, mix),
        Stage(1024, 2, 250, mix),
        Stage(2048, 1, 150, mix),
    )


class Progress:
    """Share of answer characters that are right with the true past given, and nats per character of text."""

    def __init__(self, cfg: ModelConfig, tokenizer: Tokenizer, length: int, rows: int = 4):
        """Draws the batches; the same in every run."""
        self.step = make_eval_step(cfg)
        self.batches = {}
        for kind in KINDS:
            drawn = [
                document_row(np.random.default_rng([1, row]), kind, length, tokenizer) for row in range(rows)
            ]
            scored = 1.0 if kind != "text" else max(drawn[0][1])
            self.batches[kind] = batch_of([(ids, (w >= scored).astype(np.float32)) for ids, w in drawn])

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        values = {}
        for kind, batch in self.batches.items():
            sums = self.step(params, batch)
            values[kind] = float((sums.nats if kind == "text" else sums.correct) / sums.weight)
        return values


def train(kind: str, cfg: ModelConfig, tokenizer: Tokenizer, options: argparse.Namespace) -> LanguageModel:
    """Train one model, or take up where it stopped."""
    stages = curriculum(options.quick)
    total = sum(stage.steps for stage in stages)
    optim = OptimConfig(
        lr=options.lr or RATE, warmup_steps=min(50, total // 10), total_steps=total, decay_fraction=0.3
    )
    console = make_console()
    done = 0
    for stage in stages:
        done += stage.steps
        console.print(f"{kind}: rows of {stage.length} tokens, up to step {done}")
        display = TrainingDisplay(console, 1.0)
        with display:
            # Each stage is the same run with a later end: it goes on from the checkpoint of the one before.
            result = fit(
                cfg,
                optim,
                CurriculumBatches(tokenizer, stages),
                TrainSettings(steps=done, eval_every=max(1, total // 40), save_seconds=120.0),
                folder=options.out / kind,
                evaluate=Progress(cfg, tokenizer, 256 if options.quick else 512),
                callbacks=[Watcher(display, None)],
            )
        if result.interrupted is not None:
            raise SystemExit("Stopped; the same command goes on.")
    return LanguageModel(cfg, result.params, tokenizer)


def measure(kind: str, model: LanguageModel, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy by task and length of context, and bits per byte of source."""
    lengths = {
        "recall": (64,) if options.quick else (512, 1024, 2048, 4096, 8192),
        "arithmetic": (104,) if options.quick else (128, 256, 512),
    }
    count = options.samples or (2 if options.quick else 100 if options.full else 50)
    seen = [
        task for task in TASKS if any(stage.mix[KINDS.index(task)] for stage in curriculum(options.quick))
    ]
    return {
        "accuracy": [accuracy(model, task, length, count) for task in seen for length in lengths[task]],
        "bits_per_byte": {
            str(length): bits_per_byte(model, length)
            for length in ((64,) if options.quick else (1024, 2048, 4096))
        },
    }


def history(folder: Path) -> dict[str, Any]:
    """The curves of a run, as plain lists."""
    rows = read_jsonl(folder / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    return {
        "seconds": train[-1]["elapsed"],
        "steps": train[-1]["step"],
        "loss": [[row["step"], round(row["loss"], 4)] for row in train[:: max(1, len(train) // 400)]],
        "progress": [
            {"step": row["step"]} | {kind: round(row[kind], 4) for kind in KINDS}
            for row in rows
            if row["kind"] == "eval"
        ],
    }


def draw(results: dict[str, Any], png: Path) -> None:
    """Teacher-forced accuracy on the way, and greedy accuracy by length at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, result), color in zip(sorted(results.items()), ("#2c5f9e", "#c8502d")):
        for task, style in zip(TASKS, ("-", "--")):
            label = f"{name}, {task}"
            points = [(point["step"], point[task]) for point in result["progress"]]
            left.plot(*zip(*points), color=color, linestyle=style, label=label)
            points = [(row["length"], row["exact"]) for row in result["accuracy"] if row["task"] == task]
            if points:
                right.plot(
                    *zip(*points), color=color, linestyle=style, marker="o", markersize=3.5, label=label
                )
    right.axhline(0.9, color="#666666", linewidth=0.9, linestyle=":")
    left.set(xlabel="step", ylabel="answer characters right", ylim=(0, 1.02))
    right.set(
        xlabel="characters of context", ylabel="answers right, greedy", xscale="log", ylim=(-0.02, 1.02)
    )
    lengths = sorted({row["length"] for result in results.values() for row in result["accuracy"]})
    right.set_xticks(lengths, [f"{length:,}" for length in lengths])
    right.set_xticks([], minor=True)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(png)


def report(
    kind: str, cfg: ModelConfig, options: argparse.Namespace, size: int, scores: dict[str, Any]
) -> None:
    """Put one model's figures beside those of the other, and draw both."""
    folder = options.out if options.quick else RESULTS
    file = folder / "train_long_context.json"
    results = json.loads(file.read_text(encoding="utf-8"))["results"] if file.is_file() else {}
    results[kind] = {
        "pattern": cfg.pattern,
        "parameters": parameter_count(cfg),
        "bytes": size,
        "stages": [
            {
                "length": stage.length,
                "rows": stage.rows,
                "steps": stage.steps,
                "mix": dict(zip(KINDS, stage.mix)),
            }
            for stage in curriculum(options.quick)
        ],
        "lr": options.lr or RATE,
        **history(options.out / kind),
        **scores,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    content = {
        "command": "python experiments/train_long_context.py",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "results": results,
    }
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")
    draw(results, file.with_suffix(".png"))


def show(results: dict[str, Any]) -> None:
    """The accuracies as a table."""
    table = Table("task", "context", "samples", "exact", "95 %", "final")
    for row in results["accuracy"]:
        low, high = row["exact_interval"]
        table.add_row(
            row["task"],
            f"{row['length']:,}",
            str(row["samples"]),
            f"{row['exact']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['final']:.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps; writes no results")
    parser.add_argument("--full", action="store_true", help="100 samples of each length instead of 50")
    parser.add_argument("--samples", type=int, help="samples of each length, whatever else is said")
    parser.add_argument("--kind", choices=("attention", "hybrid"), help="only this model")
    parser.add_argument("--lr", type=float, help="peak learning rate (0.0015)")
    parser.add_argument("--out", type=Path, help="folder of the runs (runs/train_long_context)")
    options = parser.parse_args()
    options.out = options.out or ROOT / "runs" / ("long_context_quick" if options.quick else "long_context")
    tokenizer = byte_tokenizer()
    for kind, cfg in models(options.quick).items():
        if options.kind not in (None, kind):
            continue
        trained = train(kind, cfg, tokenizer, options)
        folder = (options.out if options.quick else CHECKPOINTS) / (f"{kind}-hf" if options.quick else kind)
        hf.save(trained, folder, dtype="bfloat16")
        size = sum(file.stat().st_size for file in folder.iterdir())
        assert size <= LARGEST, f"{folder} takes {size} bytes"
        # What is measured is what is shipped.
        scores = measure(kind, jaxllm.load(folder), options)
        report(kind, cfg, options, size, scores)
        Console().print(f"{kind}: {parameter_count(cfg):,} parameters, {size / 1e6:.1f} MB in {folder}")
        show(scores)


if __name__ == "__main__":
    main()
