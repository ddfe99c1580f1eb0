"""What a run was started with: written at its start, read when it is resumed."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jaxllm.cli import field_types, run_folder
from jaxllm.cli.errors import UserError
from jaxllm.cli.quickstart.settings import Settings
from jaxllm.config import ConfigError, ModelConfig, decode

FILE = "quickstart.json"


@dataclass(frozen=True)
class Record:
    """The start of a run.

    Attributes:
        minutes: training time.
        data: the corpus.
        seed: of weights and data order.
        settings: batch and schedule.
        model: the model; None until the tokenizer's vocabulary is known.
        loss_before: validation loss of the untrained model.
    """

    minutes: float
    data: str
    seed: int
    settings: Settings
    model: ModelConfig | None = None
    loss_before: float | None = None

    def write(self, folder: Path) -> None:
        """Writes the record into the run's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {**asdict(self), "model": None if self.model is None else self.model.to_dict()}
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, minutes: float | None) -> "Record":
        """The record of a run that shall go on.

        Args:
            folder: the run's.
            minutes: a new training time; None keeps the old one.

        Raises:
            UserError: the folder holds no run of the quickstart.
        """
        file = folder / FILE
        if not file.is_file():
            raise UserError(
                "--out",
                str(folder),
                "with --resume, the folder of a run",
                f"There is no {file}; start without --resume.",
            )
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            record = decode(cls, field_types.checked(cls, content))
        except (ValueError, ConfigError) as error:
            raise UserError("--out", str(folder), f"the folder of a run ({file}: {error})") from None
        return record if minutes is None else replace(record, minutes=minutes)


def choose_folder(out: Path | None, resume: bool, name: str) -> Path:
    """The run's folder: ``out``, or runs/<name>, or the next free runs/<name>-2, -3, ...

    Raises:
        UserError: ``out`` holds a run and shall not be resumed, or cannot hold one.
    """
    if out is None:
        folder, number = Path("runs") / name, 2
        while not resume and folder.exists():
            folder, number = Path("runs") / f"{name}-{number}", number + 1
        run_folder.check(folder)
        return folder
    run_folder.check(out)
    if not resume and out.is_dir() and any(out.iterdir()):
        hint = "Add --resume to go on with it, or give another folder."
        raise UserError("--out", str(out), "a new or empty folder", hint)
    return out
