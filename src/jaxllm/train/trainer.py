"""The host loop around the compiled step: data, clock, evaluation, checkpoints, signals."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.config import ConfigError, ModelConfig, require
from jaxllm.model.functional import Params, flatten, stack, unstack
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.clock import Clock
from jaxllm.train.context import Ahead, Batches, Scatterer, Slots, check_context
from jaxllm.train.events import Callback, CompileEvent, EvalEvent, SaveEvent
from jaxllm.train.interrupt import StopRequest
from jaxllm.train.memory import estimate_training_memory, is_out_of_memory, out_of_memory
from jaxllm.train.optim import OptimConfig, learning_rate
from jaxllm.train.placement import placement, state_shardings
from jaxllm.train.report import Pending, Reporter
from jaxllm.train.seal import write_atomically
from jaxllm.train.settings import FitResult, TrainSettings
from jaxllm.train.state import TrainPlan, TrainState, abstract_state, init_state, state_of
from jaxllm.train.step import Metrics, make_train_step
from jaxllm.train.writers import JsonlWriter, TensorBoardWriter, WandbWriter
from parallel.context.scattered import Scattered
from parallel.distributed import agreed
from parallel.mesh import ROWS, MeshShape, place_rows, row_shards, row_share

Evaluate = Callable[[Params, int], dict[str, float]]

# After this many steps the peak is measured: short runs do without a utilisation and start sooner.
PEAK_AFTER = 10


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Trainer:
    """One run: the state goes from step to step, the rest is here; see :class:`Reporter` for what is told of it."""

    def __init__(
        self,
        cfg: ModelConfig,
        optim: OptimConfig,
        loader: Batches,
        settings: TrainSettings,
        *,
        folder: Path | str | None = None,
        evaluate: Evaluate | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = True,
        params: Params | None = None,
        files: dict[str, bytes] | None = None,
    ):
        """See :func:`fit`."""
        if settings.seconds is None and settings.steps is not None and optim.total_steps is None:
            optim = replace(
                optim, total_steps=settings.steps, warmup_steps=min(optim.warmup_steps, settings.steps - 1)
            )
        if settings.seconds is None and optim.schedule != "constant":
            require(
                optim.total_steps is not None,
                "optim.total_steps",
                None,
                f"schedule={optim.schedule!r} needs it, or steps or seconds to train; or use schedule='constant'",
            )
        self.cfg, self.optim, self.settings = cfg, optim, settings
        self.loader: Batches | Ahead = loader
        self.folder = None if folder is None else Path(folder)
        self.evaluate, self.resume, self.initial, self.files = evaluate, resume, params, files or {}
        self.reporter = Reporter(cfg, settings, list(callbacks))
        self._take_devices()
        self.step = 0
        self.values: dict[str, float] = {}
        self.checkpoints: Checkpoints | None = None
        self._compiled: Any = None
        self._compiled_for: Any = None
        self._elapsed_before = self._evaluated_at = self._saved_at = 0.0
        self._saved_step: int | None = None
        self._evaluated_step: int | None = None
        self._resumed: int | None = None
        self._stopped: str | None = None
        self._agreed: float | None = None

    def _take_devices(self) -> None:
        self.place = placement(self.cfg, self.settings.mesh)
        self._slices = 1 if self.place is None else row_share(self.place.mesh)[1]
        self.scatterer = self._scatterer()
        if self.scatterer is not None:
            assert not isinstance(self.loader, Ahead)
            self.loader = Ahead(self.loader, self.scatterer)

    def run(self) -> FitResult:
        """Train to the end, or to a signal."""
        with ExitStack() as stack:
            request = stack.enter_context(StopRequest())
            if self.settings.debug_nans:
                stack.enter_context(jax.debug_nans(True))
            stack.callback(self.reporter.stop_trace)
            if isinstance(self.loader, Ahead):
                stack.callback(self.loader.close)
            state = self._start()
            if self.checkpoints is not None:
                stack.enter_context(self.checkpoints)
            self._open_writers(stack)
            try:
                state = self._loop(state, request)
            except Exception as error:
                if is_out_of_memory(error):
                    raise out_of_memory(self._memory(), error) from error
                raise
            interrupted = self._close(state, request)
        return self._result(state.params, interrupted)

    def _close(self, state: TrainState, request: StopRequest) -> str | None:
        """The last evaluation and checkpoint; what interrupted the run."""
        interrupted = None if self._over() else request.name or self._stopped
        if interrupted is None:
            self._evaluate(state)
        self._save(state)
        return interrupted

    def _result(self, params: Params, interrupted: str | None) -> FitResult:
        last = self.reporter.last
        return FitResult(
            *unstack(self.cfg, params),
            self.step,
            self.reporter.clock.elapsed,
            self.reporter.tokens_seen,
            None if last is None else last.loss,
            self.values,
            interrupted,
            self.folder,
        )

    def _scatterer(self) -> Scatterer | None:
        """Where devices share documents."""
        if self.place is None or self.place.size("context") == 1:
            return None
        check_context(self.cfg, MeshShape(**self.place.mesh.shape), self.settings.context)
        require(
            self.settings.context.exchange != "ragged" or self.place.mesh.devices.flat[0].platform != "cpu",
            "context.exchange",
            "ragged",
            "XLA has no ragged all-to-all for CPUs; must be rotate there",
        )
        return Scatterer(self.cfg, self.settings.context, self.place.mesh, self.settings.step.accum_steps)

    def _start(self) -> TrainState:
        """The state to begin with: of the newest checkpoint if there is one, else new."""
        shardings = None if self.place is None else state_shardings(self.cfg, self.optim, self.place)
        if self.folder is not None:
            self.checkpoints = self._open_checkpoints(self.folder)
            restored = self._restore(self.checkpoints, shardings)
            if restored is not None:
                return restored
            contents = {"config.json": self.cfg.to_json().encode(), **self.files}
            for name, data in (contents if jax.process_index() == 0 else {}).items():
                write_atomically(self.folder / name, data)
        seed = self.settings.seed
        if self.initial is None:
            return init_state(self.cfg, self.optim, seed, shardings)
        params = stack(self.cfg, self.initial)
        if shardings is not None:
            params = jax.device_put(params, shardings.params)
        return state_of(params, self.optim, seed, shardings)

    def _open_checkpoints(self, folder: Path) -> Checkpoints:
        return Checkpoints(folder / "checkpoints", max_to_keep=self.settings.keep)

    def _restore(self, checkpoints: Checkpoints, shardings: TrainState | None) -> TrainState | None:
        if checkpoints.steps() and not self.resume:
            raise ConfigError(
                f"resume=False, but {self.folder} holds checkpoints up to step {checkpoints.steps()[-1]}; resume, or "
                "train in another folder"
            )
        target = abstract_state(self.cfg, self.optim)
        if shardings is not None:
            target = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), target, shardings
            )
        found = checkpoints.restore_latest(target, self.cfg)
        if found is None:
            return None
        self.step = self._saved_step = self._resumed = found.step
        self.loader.restore(found.meta["loader"])
        self.reporter.tokens_seen = found.meta["tokens_seen"]
        self._elapsed_before = self._evaluated_at = self._saved_at = found.meta["elapsed"]
        self.reporter.clock = Clock(self._elapsed_before)
        return found.state

    def _open_writers(self, stack: ExitStack) -> None:
        writers: list[Any] = []

        def opened(writer: Any) -> None:
            # At once: the next writer may fail to open.
            stack.callback(writer.close)
            writers.append(writer)

        if jax.process_index() != 0:
            return
        if self.folder is not None:
            opened(JsonlWriter(self.folder / "metrics.jsonl", first_step=self.step))
            if self.settings.tensorboard:
                opened(TensorBoardWriter(self.folder / "tensorboard"))
        if self.settings.wandb is not None:
            settings = {"model": self.cfg.to_dict(), "optim": asdict(self.optim)}
            opened(WandbWriter(self.settings.wandb, settings, self.folder))
        self.reporter.callbacks[:0] = writers

    def _loop(self, state: TrainState, request: StopRequest) -> TrainState:
        self.reporter.clock = Clock(self._elapsed_before)
        with self.reporter.clock.paused():
            if not self._over():
                given = self._next()
                self._compile(state, *given)
        batch_ready = not self._over()
        self._keep_together(request)
        while self._goes_on():
            begin = time.perf_counter()
            if not batch_ready:
                given = self._next()
                if self._compiled_for != _program(given):
                    with self.reporter.clock.paused():
                        self._compile(state, *given)
            batch_ready = False
            batch, scattered = given
            placed = time.perf_counter()
            self.reporter.start_trace(self.step, str((self.folder or Path()) / "profile"))
            state, metrics = self._advance(state, batch, self._plan(scattered))
            dispatched = time.perf_counter()
            self.step += 1
            self.reporter.enqueue(
                Pending(self.step, metrics, self.progress, placed - begin, dispatched - placed)
            )
            self._between(state)
            self._keep_together(request)
        self.reporter.flush()
        return state

    def _goes_on(self) -> bool:
        return not self._over() and self._stopped is None

    def _advance(
        self, state: TrainState, batch: PackedBatch, plan: TrainPlan | None
    ) -> tuple[TrainState, Metrics]:
        return self._compiled(state, batch, plan)

    @property
    def _now(self) -> float:
        """Training seconds; those that the processes agreed on before this step, where there are several."""
        return self.reporter.clock.elapsed if self._agreed is None else self._agreed

    def _keep_together(self, request: StopRequest) -> None:
        """Note a signal; every process must stop, evaluate and save at the same step as the others."""
        self._stopped = request.name
        if jax.process_count() > 1:
            elapsed, stop = agreed(int(1000 * self.reporter.clock.elapsed), int(request.name is not None))
            self._agreed = elapsed / 1000
            self._stopped = request.name or ("a signal to another process" if stop else None)

    def _next(self) -> tuple[PackedBatch, Scattered | None]:
        """The next batch on the devices; with devices along ``context`` its slots, and the plan of them."""
        batch = next(self.loader)
        if self.scatterer is not None:
            assert isinstance(batch, Slots)
            rows = batch.scattered.rows * self.scatterer.config.groups * self.scatterer.config.parts
            self.reporter.shape = rows, batch.scattered.length
            return self.scatterer.place(batch)
        assert isinstance(batch, PackedBatch)
        rows = batch.shape[0] * self._slices
        self.reporter.shape = rows, batch.shape[1]
        if self.place is None:
            return jax.device_put(batch), None
        shards, parts = row_shards(self.place.mesh), self.settings.step.accum_steps
        product = " * ".join(ROWS) + (f" * accum_steps = {shards} * {parts}" if parts > 1 else f" = {shards}")
        require(rows % (shards * parts) == 0, "batch_size", rows, f"must be a multiple of {product}")
        return place_rows(self.place.mesh, batch), None

    def _compile(self, state: TrainState, batch: PackedBatch, scattered: Scattered | None) -> None:
        begin = time.perf_counter()
        debug = self.settings.debug_nans
        step = self._make_step()
        # Compiled ahead, so that the clock starts at the first step; jax_debug_nans needs the traced function.
        self._compiled = step if debug else step.lower(state, batch, self._plan(scattered)).compile()
        self._compiled_for = _program((batch, scattered))
        count = sum(leaf.size for leaf in flatten(state.params).values())
        self.reporter.emit(CompileEvent(time.perf_counter() - begin, count, self._resumed))
        self._resumed = None

    def _make_step(self) -> Any:
        donate = not self.settings.debug_nans
        return make_train_step(self.cfg, self.optim, self.settings.step, place=self.place, donate=donate)

    @property
    def progress(self) -> float | None:
        """Share of the run that is over, by the clock or by steps, whichever is further."""
        shares = []
        if self.settings.seconds is not None:
            shares.append(self._now / self.settings.seconds)
        if self.settings.steps is not None:
            shares.append(self.step / self.settings.steps)
        return min(1.0, max(shares)) if shares else None

    def _over(self) -> bool:
        return self.progress is not None and self.progress >= 1.0

    def _plan(self, scattered: Scattered | None) -> TrainPlan | None:
        """No rate where the schedule goes by steps: the step then reads its own counter, and resuming is exact."""
        lr = None
        if self.settings.seconds is not None:
            lr = np.asarray(learning_rate(self.optim, self.step, self.progress))
        return None if lr is None and scattered is None else TrainPlan(lr, scattered)

    def _between(self, state: TrainState) -> None:
        settings, elapsed = self.settings, self._now
        self.reporter.measure_peak(self.step, 1 if self.place is None else self.place.mesh.size)
        if _due(self.step, settings.eval_every, elapsed - self._evaluated_at, settings.eval_seconds):
            self.reporter.flush()
            self._evaluate(state)
        if _due(self.step, settings.save_every, elapsed - self._saved_at, settings.save_seconds):
            self._save(state)

    def _evaluate(self, state: TrainState) -> None:
        if self.evaluate is None or self._evaluated_step == self.step:
            return
        with self.reporter.clock.paused():
            begin = time.perf_counter()
            self.values = self.evaluate(state.params, self.step)
            took = time.perf_counter() - begin
        self._evaluated_at, self._evaluated_step = self._now, self.step
        self.reporter.emit(EvalEvent(self.step, self._evaluated_at, self.values, took))

    def _save(self, state: TrainState) -> None:
        if self.checkpoints is None or self._saved_step == self.step:
            return
        self.reporter.flush()
        with self.reporter.clock.paused():
            self._write(self.checkpoints, state)
        self._saved_at, self._saved_step = self._now, self.step
        self.reporter.emit(SaveEvent(self.step, self.checkpoints.folder))

    def _write(self, checkpoints: Checkpoints, state: TrainState) -> None:
        meta = {
            "model": self.cfg.to_dict(),
            "optim": self.optim.to_dict(),
            "loader": self.loader.state(),
            "tokens_seen": self.reporter.tokens_seen,
            "elapsed": self.reporter.clock.elapsed,
        }
        checkpoints.save(self.step, state, meta)

    def _memory(self) -> Any:
        rows, length = self.reporter.shape
        shape = MeshShape() if self.place is None else MeshShape(**self.place.mesh.shape)
        return estimate_training_memory(
            self.cfg, rows, length, shape, self.settings.step, self.settings.context
        )


def _program(given: Any) -> Any:
    """What a batch needs another program for if it is another."""
    leaves, structure = jax.tree.flatten(tuple(given))
    return structure, tuple(x.shape for x in leaves)


def _due(step: int, every: int | None, since: float, seconds: float | None) -> bool:
    return (every is not None and step % every == 0) or (seconds is not None and since >= seconds)


def fit(
    cfg: ModelConfig,
    optim: OptimConfig,
    loader: Batches,
    settings: TrainSettings,
    *,
    folder: Path | str | None = None,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
    params: Params | None = None,
    files: dict[str, bytes] | None = None,
) -> FitResult:
    """Train until ``settings`` say stop, or until SIGINT or SIGTERM; a second signal aborts.

    Args:
        cfg: model.
        optim: optimiser; without ``total_steps`` the schedule is as long as ``settings.steps``.
        loader: stands before the first batch; a resumed run moves it to the exact next one. It gives this process's rows,
            or all of them where devices share documents.
        settings: see :class:`TrainSettings`.
        folder: where ``config.json``, ``metrics.jsonl`` and ``checkpoints/`` go; None writes nothing.
        evaluate: ``(params, step) -> values`` by name; ``params`` are those of ``cfg``, stacked if it says so, and must
            not be kept: the next step overwrites them.
        callbacks: called in the training thread with every :mod:`jaxllm.train.events` event.
        resume: go on from the newest sound checkpoint in ``folder``.
        params: start from these, one entry per layer, instead of fresh ones; not used when a checkpoint is resumed.
        files: written beside ``config.json``, e.g. ``tokenizer.json``.

    Raises:
        ConfigError: settings that do not fit each other, the devices or the checkpoint.
        TrainingDiverged: too many non-finite steps in a row.
        OutOfMemory: the device is too small; the message names the largest buffers.
        CheckpointError: a checkpoint cannot be read or written.
    """
    return Trainer(
        cfg,
        optim,
        loader,
        settings,
        folder=folder,
        evaluate=evaluate,
        callbacks=callbacks,
        resume=resume,
        params=params,
        files=files,
    ).run()
