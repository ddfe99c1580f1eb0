"""Steps in flight: wait for the one before, count it, tell of it."""

import time
from typing import Any, NamedTuple

import jax

from jaxllm.config import ModelConfig
from jaxllm.train.clock import Clock
from jaxllm.train.events import Callback, Event, StepEvent
from jaxllm.train.flops import measured_peak, training_flops_per_token
from jaxllm.train.settings import TrainSettings
from jaxllm.train.step import Metrics

# After this many steps the peak is measured: short runs do without a utilisation and start sooner.
PEAK_AFTER = 10


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Pending(NamedTuple):
    """A step in flight: its number, its metrics on the device, the run's progress after it, the host's times for it."""

    step: int
    metrics: Metrics
    progress: float | None
    data_seconds: float
    dispatch_seconds: float


class Reporter:
    """Keeps one step in flight, so that the device never waits for the host to read its metrics."""

    def __init__(self, cfg: ModelConfig, settings: TrainSettings, callbacks: list[Callback]):
        self.cfg, self.settings, self.callbacks = cfg, settings, callbacks
        self.clock = Clock()
        self.shape: tuple[int, int] = (0, 0)
        self.tokens_seen = 0
        self.last: StepEvent | None = None
        self._pending: Pending | None = None
        self._peak: float | None = None
        self._tracing = False

    def emit(self, event: Event) -> None:
        """Tell every callback."""
        for callback in self.callbacks:
            callback(event)

    def enqueue(self, pending: Pending) -> None:
        """Note a step that has been dispatched; wait for the one before it.

        Raises:
            TrainingDiverged: that one ended too long a row of non-finite steps.
        """
        previous, self._pending = self._pending, pending
        if previous is not None:
            self._finish(previous)

    def flush(self) -> None:
        """Wait for the step in flight, if there is one."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._finish(pending)

    def measure_peak(self, step: int, devices: int) -> None:
        """Measure what a matrix product reaches here, once, with the clock stopped."""
        if self._peak is None and step == PEAK_AFTER:
            self.flush()
            with self.clock.paused():
                operand = self.cfg.precision.operand or self.cfg.precision.compute
                self._peak = measured_peak(operand) * devices

    def start_trace(self, step: int, folder: str) -> None:
        """Start tracing if ``step`` is the first to be traced."""
        if self.settings.profile is not None and step == self.settings.profile[0]:
            self.flush()
            jax.profiler.start_trace(folder)
            self._tracing = True

    def stop_trace(self, step: int | None = None) -> None:
        """Stop tracing once ``step`` steps are done; None: in any case."""
        if self._tracing and (step is None or (self.settings.profile or (0, 0))[1] <= step):
            jax.profiler.stop_trace()
            self._tracing = False

    def _finish(self, pending: Pending) -> None:
        begin = time.perf_counter()
        metrics: Any = jax.device_get(pending.metrics)
        waited = time.perf_counter() - begin
        self.stop_trace(pending.step)
        self.tokens_seen += int(metrics.tokens)
        speed = self.clock.mark(self.shape[0] * self.shape[1])
        mfu = None
        if self._peak is not None:
            mfu = speed * training_flops_per_token(self.cfg, self.shape[1]) / self._peak
        stats = jax.local_devices()[0].memory_stats() or {}
        names = ("loss", "z_loss", "accuracy", "grad_norm", "lr", "mtp_loss")
        self.last = StepEvent(
            step=pending.step,
            **{name: float(getattr(metrics, name)) for name in names},
            balance_loss=_float(metrics.balance_loss),
            imbalance=_float(metrics.imbalance),
            tokens=int(metrics.tokens),
            skipped=int(metrics.skipped),
            tokens_seen=self.tokens_seen,
            elapsed=self.clock.elapsed,
            progress=pending.progress,
            tokens_per_second=speed,
            mfu=mfu,
            data_seconds=pending.data_seconds,
            dispatch_seconds=pending.dispatch_seconds,
            device_seconds=waited,
            device_bytes=stats.get("bytes_in_use"),
        )
        if pending.step % self.settings.log_every == 0:
            self.emit(self.last)
        row = int(metrics.consecutive_skips)
        if row >= self.settings.max_consecutive_skips:
            raise TrainingDiverged(
                f"the loss or the gradient was not finite for {row} steps in a row, up to step {pending.step}; these "
                f"updates were left out, so the parameters are still finite. Lower lr={float(metrics.lr):g} or "
                "clip_norm, lengthen the warm-up, or look for the operation with debug_nans; then resume from the "
                "newest checkpoint."
            )


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
