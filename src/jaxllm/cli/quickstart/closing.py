"""What figures.json holds beside the numbers, and the loss curve with its baselines."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxllm.cli import machine
from jaxllm.cli.display import duration
from jaxllm.cli.loss_curve import draw, read_points
from jaxllm.cli.quickstart import Args, report
from jaxllm.cli.quickstart.baselines import Baseline
from jaxllm.cli.quickstart.record import Record
from jaxllm.config import ModelConfig
from jaxllm.data.prepare import PreparedData


def inputs(args: Args, record: Record, cfg: ModelConfig, data: PreparedData) -> dict[str, Any]:
    """Everything that decides the run, as plain JSON values."""
    return {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()},
        "settings": asdict(record.settings),
        "minutes": record.minutes,
        "model": cfg.to_dict(),
        "corpus": {"name": data.corpus.name, **data.corpus.report()},
        "tokenizer_sha256": data.tokenizer.fingerprint,
    }


def measured(outcome: report.Outcome, baselines: list[Baseline]) -> dict[str, Any]:
    """Where it was measured, the figures, and which baselines were beaten."""
    return {
        "versions": machine.versions(),
        "machine": machine.describe(),
        "device": machine.devices(),
        "figures": report.figures(outcome, baselines),
        **report.verdicts(outcome, baselines),
    }


def picture(folder: Path, record: Record, outcome: report.Outcome, baselines: list[Baseline]) -> Path:
    """The loss curve of the run in ``folder``, drawn into it."""
    per_step = record.settings.batch_size * record.settings.seq_len
    points = read_points(folder / "metrics.jsonl", per_step)
    # The last partial evaluation stands at the same step as the whole one.
    validation = [
        (0, outcome.loss_before),
        *points["validation_loss"][:-1],
        (outcome.steps * per_step, outcome.loss_after),
    ]
    return draw(
        folder / "loss.png",
        points["loss"],
        validation,
        title=f"{outcome.parameters:,} parameters, {duration(outcome.train_seconds)} of training",
        loads=points["imbalance"],
        bits_per_nat=outcome.bits_per_nat,
        lines={b.label: b.bits_per_byte / outcome.bits_per_nat for b in baselines},
    )
