"""Where metrics go: JSON lines always, TensorBoard and Weights & Biases on request."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxllm.config import ConfigError
from jaxllm.train.events import EvalEvent, Event, StepEvent


def scalars(event: StepEvent | EvalEvent) -> dict[str, float]:
    """Numbers of an event by name, without its step; what is None is left out."""
    values = event.values if isinstance(event, EvalEvent) else asdict(event)
    return {name: value for name, value in values.items() if value is not None and name != "step"}


class JsonlWriter:
    """One JSON object per line: ``{"kind": "train" | "eval", "step": ..., ...}``; NaN and infinities are null."""

    def __init__(self, path: Path, *, first_step: int = 0):
        """Append to ``path``, without the lines of steps that are about to be trained again.

        Args:
            path: file; its folder is created.
            first_step: steps already trained; later lines of an earlier, killed run are dropped.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            kept = [json.dumps(row) + "\n" for row in read_jsonl(path) if row["step"] <= first_step]
            path.write_text("".join(kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent | EvalEvent):
            kind = "train" if isinstance(event, StepEvent) else "eval"
            values = {n: v if math.isfinite(v) else None for n, v in scalars(event).items()}
            if isinstance(event, EvalEvent):
                values["elapsed"] = event.elapsed
            self._file.write(json.dumps({"kind": kind, "step": event.step, **values}) + "\n")

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut short by a kill is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class TensorBoardWriter:
    """Event files for TensorBoard, under ``train/`` and ``eval/``."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent | EvalEvent):
            kind = "train" if isinstance(event, StepEvent) else "eval"
            for name, value in scalars(event).items():
                self._writer.add_scalar(f"{kind}/{name}", value, event.step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run."""

    def __init__(self, project: str, settings: dict[str, Any], folder: Path | None = None):
        """Start the run; its own files go into ``folder``, without one into the current folder.

        Raises:
            ConfigError: wandb is not installed.
        """
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"wandb={project!r}: wandb is not installed; pip install 'jaxllm[wandb]'"
            ) from error
        self._run = wandb.init(project=project, config=settings, dir=folder)

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent | EvalEvent):
            kind = "train" if isinstance(event, StepEvent) else "eval"
            self._run.log({f"{kind}/{n}": v for n, v in scalars(event).items()}, step=event.step)

    def close(self) -> None:
        self._run.finish()
