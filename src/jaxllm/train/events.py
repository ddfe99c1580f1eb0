"""What the training loop tells those who watch: progress bars, writers, tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CompileEvent:
    """The step has been compiled (or loaded from the cache), which took ``seconds``."""

    seconds: float
    parameters: int
    resumed_from: int | None


@dataclass(frozen=True)
class StepEvent:
    """One finished step.

    Attributes:
        step: batches trained on, this one included.
        loss: nats per scored token.
        z_loss: per token, as added to the objective.
        accuracy: of the next token, in [0, 1].
        grad_norm: before clipping.
        lr: learning rate.
        mtp_loss: nats per token, mean of the multi-token prediction depths; 0 without them.
        balance_loss: the experts' load-balancing loss, summed over layers and not weighted; None without experts.
        imbalance: load of the busiest expert over the mean, of the worst layer; None without experts.
        tokens: scored tokens of this step.
        skipped: updates left out so far.
        tokens_seen: scored tokens since step 0.
        elapsed: seconds of training since step 0, without compilation, evaluation and saving.
        progress: share of the run that is over, in [0, 1]; None for an endless run.
        tokens_per_second: positions (padding included) per second, over the last steps.
        mfu: model FLOPs over the measured matrix-product peak, in [0, 1]; None until the peak is known.
        data_seconds: this step's wait for data.
        dispatch_seconds: this step's time to enqueue.
        device_seconds: this step's wait for the device.
        device_bytes: bytes in use on the first device; None where the backend does not report it.
    """

    step: int
    loss: float
    z_loss: float
    accuracy: float
    grad_norm: float
    lr: float
    mtp_loss: float
    balance_loss: float | None
    imbalance: float | None
    tokens: int
    skipped: int
    tokens_seen: int
    elapsed: float
    progress: float | None
    tokens_per_second: float
    mfu: float | None
    data_seconds: float
    dispatch_seconds: float
    device_seconds: float
    device_bytes: int | None


@dataclass(frozen=True)
class EvalEvent:
    """What the evaluation hook returned after ``step`` steps; ``seconds`` is what it took."""

    step: int
    elapsed: float
    values: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class SaveEvent:
    """A checkpoint of ``step`` is being written (it is complete when the next one starts or the run ends)."""

    step: int
    folder: Path


@dataclass(frozen=True)
class AssignmentEvent:
    """From the step after ``step`` steps on, other workers train the shards of the batch, or run the stages, than before.

    Attributes:
        step: batches trained on so far.
        workers: of the run, living or not; shard i is worker i's while all live, or stage ``i % stages`` of replica
            ``i // stages``.
        jobs: shards or stages of each living worker; who has several does them with degraded gradients, if the run has
            such. None: its replica cannot train.
        stages: of a pipeline; 1: the batch is shared.
    """

    step: int
    workers: int
    jobs: dict[int, tuple[int, ...]]
    stages: int = 1


@dataclass(frozen=True)
class ForeseenEvent:
    """What a world of fewer workers will run has been compiled beside training, which took ``seconds``.

    Attributes:
        members: workers of that world.
        seconds: of compiling, while steps went on.
    """

    members: int
    seconds: float


Event = CompileEvent | StepEvent | EvalEvent | SaveEvent | AssignmentEvent | ForeseenEvent
Callback = Callable[[Event], None]
