"""The closing table and figures.json: what was measured, with what, and which baselines were beaten."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxllm.cli.display import MISSING, bold, count, duration, number, short, table
from jaxllm.cli.quickstart.baselines import Baseline


@dataclass(frozen=True)
class Outcome:
    """The measured figures of a run.

    Attributes:
        parameters: of the model.
        steps: training steps.
        train_tokens: tokens trained on, repetitions included.
        unique_tokens: distinct corpus tokens among them.
        train_seconds: by the clock, compilation not included.
        compile_seconds: of all programs of the training.
        tokens_per_second: train_tokens / train_seconds.
        train_loss: nats per token at the end, a running mean.
        loss_before: validation loss of the untrained model, in nats per token.
        loss_after: validation loss at the end.
        bits_per_nat: bits per byte of one nat per token on the validation text.
        first_token_seconds: from the prompt to the first token, programs compiled.
        decode_tokens_per_second: of one sequence, after its first token.
    """

    parameters: int
    steps: int
    train_tokens: int
    unique_tokens: int
    train_seconds: float
    compile_seconds: float
    tokens_per_second: float
    train_loss: float | None
    loss_before: float
    loss_after: float
    bits_per_nat: float
    first_token_seconds: float | None = None
    decode_tokens_per_second: float | None = None

    @property
    def bits_per_byte(self) -> float:
        """Of the trained model on the validation text."""
        return self.loss_after * self.bits_per_nat


def verdicts(outcome: Outcome, baselines: list[Baseline]) -> dict[str, bool]:
    """``beats_<baseline>`` for each: fewer bits per byte on the same text."""
    return {f"beats_{b.key}": outcome.bits_per_byte < b.bits_per_byte for b in baselines}


def figures(outcome: Outcome, baselines: list[Baseline]) -> dict[str, Any]:
    """All numbers by name, in base units."""
    named = dict(vars(outcome)) | {
        "bits_per_byte_before": outcome.loss_before * outcome.bits_per_nat,
        "bits_per_byte_after": outcome.bits_per_byte,
    }
    for baseline in baselines:
        named[f"{baseline.key}_bits_per_byte"] = baseline.bits_per_byte
        if baseline.nats_per_token is not None:
            named[f"{baseline.key}_nats_per_token"] = baseline.nats_per_token
    return named


def write(path: Path, content: dict[str, Any]) -> Path:
    """Writes JSON that other processes see whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return temporary.replace(path)


def show(console: Console, outcome: Outcome, baselines: list[Baseline], paths: dict[str, Path]) -> None:
    """The closing tables."""
    losses = table(
        "validation", "nats/token", "bits/byte", "", right=(1, 2), title="What the model has learned"
    )
    before = outcome.loss_before
    losses.add_row("before training", number(before), number(before * outcome.bits_per_nat), "")
    losses.add_row(
        bold("after training"),
        bold(number(outcome.loss_after)),
        bold(number(outcome.bits_per_byte)),
        "",
    )
    for baseline in sorted(baselines, key=lambda b: -b.bits_per_byte):
        won = outcome.bits_per_byte < baseline.bits_per_byte
        word = Text("beaten", style="green") if won else Text("not beaten", style="red")
        losses.add_row(baseline.label, number(baseline.nats_per_token), number(baseline.bits_per_byte), word)
    console.print(losses)

    speed = table("measured", "", right=(1,), title="How it went")
    first, decode = outcome.first_token_seconds, outcome.decode_tokens_per_second
    for name, value in (
        ("parameters", f"{count(outcome.parameters)} ({short(outcome.parameters)})"),
        (
            "training",
            f"{duration(outcome.train_seconds)}, {count(outcome.steps)} steps, {count(outcome.train_tokens)} tokens",
        ),
        ("of them unique", f"{count(outcome.unique_tokens)} tokens"),
        ("compilation, not in the above", duration(outcome.compile_seconds)),
        ("training speed", f"{count(outcome.tokens_per_second)} tokens/s"),
        ("time to first token", MISSING if first is None else f"{first * 1e3:.1f} ms"),
        ("decoding, one sequence", MISSING if decode is None else f"{count(decode)} tokens/s"),
    ):
        speed.add_row(name, value)
    console.print(speed)

    files = table("in the run folder", "", title="Where it is")
    for name, path in paths.items():
        files.add_row(name, str(path))
    console.print(files)
