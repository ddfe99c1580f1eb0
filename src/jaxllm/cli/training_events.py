"""The trainer's events on a :class:`TrainingDisplay`, and the points of the loss curve."""

from jaxllm.cli.display import duration
from jaxllm.cli.training_display import Figures, TrainingDisplay
from jaxllm.train.events import (
    AssignmentEvent,
    CompileEvent,
    EvalEvent,
    Event,
    ForeseenEvent,
    SaveEvent,
    StepEvent,
)

# Steps of the running mean that stands for the training loss.
_HORIZON = 50


class Watcher:
    """A trainer callback.

    Attributes:
        figures: the last ones.
        compile_seconds: of the training step, of every program of it.
        resumed_from: step of the checkpoint that the run goes on from.
    """

    def __init__(self, display: TrainingDisplay, seconds: float | None = None):
        """Watches a run of so many training seconds; None: the run ends by steps."""
        self.display, self.seconds = display, seconds
        self.figures = Figures()
        self.compile_seconds = 0.0
        self.resumed_from: int | None = None
        self._count = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            self._step(event)
        elif isinstance(event, EvalEvent):
            self.figures.validation = event.values.get("validation_loss", self.figures.validation)
            self.display.update(self.figures)
        elif isinstance(event, CompileEvent):
            self.compile_seconds += event.seconds
            if event.resumed_from is not None:
                self.resumed_from = event.resumed_from
                self.display.note(f"Going on from the checkpoint of step {event.resumed_from:,}.")
            self.display.note(f"Training step ready after {duration(event.seconds)} of compilation.")
        elif isinstance(event, AssignmentEvent):
            self.display.note(assignment_text(event))
        elif isinstance(event, ForeseenEvent):
            took = duration(event.seconds)
            self.display.note(f"Ready to go on with {event.members} workers, after {took} of compilation.")
        elif isinstance(event, SaveEvent):
            pass

    def _step(self, event: StepEvent) -> None:
        figures = self.figures
        self._count += 1
        keep = 1 - 1 / min(self._count, _HORIZON)
        mean = event.loss if figures.loss is None else keep * figures.loss + (1 - keep) * event.loss
        figures.loss, figures.step, figures.elapsed = mean, event.step, event.elapsed
        figures.progress = event.progress or 0.0
        figures.tokens_per_second = event.tokens_per_second or None
        figures.losses.append(event.loss)
        if self.seconds is not None:
            figures.remaining = max(0.0, self.seconds - event.elapsed)
        elif event.progress:
            figures.remaining = event.elapsed * (1 - event.progress) / event.progress
        self.display.update(figures)


def assignment_text(event: AssignmentEvent) -> str:
    """Who trains what, in a line."""
    own = "shard" if event.stages == 1 else "stage"
    if len(event.jobs) == event.workers:
        return f"From step {event.step:,}: all {event.workers} workers train, each its own {own}."

    def text(worker: int, jobs: tuple[int, ...]) -> str:
        many = f"{own}{'s' * (len(jobs) > 1)} {' and '.join(str(job % event.stages if event.stages > 1 else job) for job in jobs)}"
        if event.stages == 1:
            return f"worker {worker} trains {many}"
        if not jobs:
            return f"worker {worker} waits for a neighbour"
        return f"worker {worker} runs {many} of replica {worker // event.stages}"

    parts = (text(worker, jobs) for worker, jobs in event.jobs.items())
    return f"From step {event.step:,}: {len(event.jobs)} of {event.workers} workers left; {', '.join(parts)}."
