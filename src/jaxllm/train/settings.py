"""Settings and results of a training run."""

from dataclasses import dataclass, field
from pathlib import Path

from jaxllm.config import ModelConfig, positive, require
from jaxllm.model.functional import Params
from jaxllm.train.context import ContextSettings
from jaxllm.train.step import StepSettings
from parallel.mesh import MeshShape


@dataclass(frozen=True)
class TrainSettings:
    """How long to train and what to do on the way.

    Attributes:
        steps: stop after this many batches in all (resumed ones included).
        seconds: stop after this much training time; compilation, evaluation and saving do not count. The schedule then
            follows the clock. With ``steps`` too, whichever comes first.
        step: settings of the compiled step.
        log_every: steps between events; every step by default, which costs microseconds.
        eval_every: steps between evaluations; there is one at the end in any case.
        eval_seconds: training seconds between evaluations.
        save_every: steps between checkpoints; there is one at the end in any case.
        save_seconds: training seconds between checkpoints.
        keep: newest checkpoints that stay.
        max_consecutive_skips: give up after this many non-finite steps in a row.
        seed: of the initial parameters and the run's key.
        mesh: devices along each axis; None: all devices along ``data``.
        context: how documents are shared by the devices along ``mesh.context``; unused where that is 1.
        profile: (FROM, TO): trace steps FROM .. TO - 1 into ``profile/``.
        debug_nans: stop at the first operation that makes a NaN; slow.
        tensorboard: also write TensorBoard event files into ``tensorboard/``.
        wandb: also log to this Weights & Biases project.
    """

    steps: int | None = None
    seconds: float | None = None
    step: StepSettings = field(default_factory=StepSettings)
    log_every: int = 1
    eval_every: int | None = None
    eval_seconds: float | None = None
    save_every: int | None = None
    save_seconds: float | None = 600.0
    keep: int = 3
    max_consecutive_skips: int = 20
    seed: int = 0
    mesh: MeshShape | None = None
    context: ContextSettings = field(default_factory=ContextSettings)
    profile: tuple[int, int] | None = None
    debug_nans: bool = False
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        positive(log_every=self.log_every, max_consecutive_skips=self.max_consecutive_skips)
        for name in ("steps", "eval_every", "save_every"):
            if getattr(self, name) is not None:
                positive(**{name: getattr(self, name)})
        for name in ("seconds", "eval_seconds", "save_seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be positive, or None")
        require(
            self.keep >= 2,
            "keep",
            self.keep,
            "must be at least 2, so that a save never replaces the only one",
        )
        if self.profile is not None:
            first, last = self.profile
            require(0 <= first < last, "profile", self.profile, "must be (FROM, TO) with 0 <= FROM < TO")


@dataclass(frozen=True)
class FitResult:
    """What a run left.

    Attributes:
        cfg: the model's configuration.
        params: float32 masters.
        step: batches trained on.
        elapsed: training seconds.
        tokens_seen: scored tokens.
        loss: of the last step, nats per token; None if no step was run.
        values: of the last evaluation; empty without one.
        interrupted: name of the signal that stopped the run; None: it reached its end.
        folder: the run's folder; None if nothing was written.
    """

    cfg: ModelConfig
    params: Params
    step: int
    elapsed: float
    tokens_seen: int
    loss: float | None
    values: dict[str, float]
    interrupted: str | None
    folder: Path | None

    @property
    def how_to_go_on(self) -> str | None:
        """A sentence for the user of an interrupted run."""
        if self.interrupted is None:
            return None
        if self.folder is None:
            return f"Stopped by {self.interrupted} after step {self.step}; nothing was saved, for no folder was given."
        return (
            f"Stopped by {self.interrupted} after step {self.step}; the state is saved in {self.folder}. Start the "
            "same command again to go on with the next batch."
        )
