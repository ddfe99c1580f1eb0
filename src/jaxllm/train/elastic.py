"""The host loop of a run whose workers may die: the trainer of one world after another, the state carried between them.

A world is what is alive at a time (:mod:`parallel.failover.membership`). In each the mesh, the step and the batches are
made anew; the committed state goes from world to world in host memory, and to those who come back over the collectives.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig, require
from jaxllm.model.functional import Params
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.clock import Clock
from jaxllm.train.events import AssignmentEvent, Callback, ForeseenEvent
from jaxllm.train.failover import FailoverSettings
from jaxllm.train.foreseen import Foreseen
from jaxllm.train.interrupt import StopRequest
from jaxllm.train.ledger import Ledger
from jaxllm.train.optim import OptimConfig
from jaxllm.train.settings import FitResult, TrainSettings
from jaxllm.train.sharing import RowSharing, SharedRun, Sharing, check_elastic
from jaxllm.train.stage_sharing import StageSharing
from jaxllm.train.state import TrainPlan, TrainState
from jaxllm.train.step import Metrics
from jaxllm.train.trainer import Evaluate, Trainer
from parallel.distributed import agreed
from parallel.failover.membership import Member
from parallel.failover.transfer import Version, carry, host_leaves
from parallel.failover.world import lost_peer
from parallel.mesh import MeshShape, make_mesh, row_share
from parallel.sharding import Placement


@runtime_checkable
class Addressed(Protocol):
    """Batches of which any row can be had, as of :class:`jaxllm.data.loader.Loader`."""

    @property
    def batch_size(self) -> int: ...

    def rows_at(self, step: int, rows: Iterable[int]) -> PackedBatch: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Shards:
    """This worker's rows of each batch: which they are is a function of the step and of who lives."""

    def __init__(self, loader: Addressed):
        """Stands before the step at which ``loader`` does."""
        self.loader = loader
        self.step = int(loader.state()["step"])
        self.rows_of: Callable[[int], np.ndarray] = lambda step: np.zeros(0, np.int32)
        self.scored: Callable[[int], bool] = lambda step: True

    def __next__(self) -> PackedBatch:
        batch = self.loader.rows_at(self.step, self.rows_of(self.step))
        if not self.scored(self.step):
            batch = batch.replace(targets=np.full_like(batch.targets, -1))
        self.step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Of the loader before the next step."""
        return self.loader.state() | {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken; raises as the loader."""
        self.loader.restore(state)
        self.step = int(state["step"])


class ElasticTrainer(Trainer):
    """See :func:`elastic_fit`."""

    def __init__(
        self,
        member: Member,
        failover: FailoverSettings,
        cfg: ModelConfig,
        optim: OptimConfig,
        loader: Addressed,
        settings: TrainSettings,
        *,
        evaluation: Callable[[], Evaluate] | None = None,
        **options: Any,
    ):
        check_elastic(settings, member.workers, loader.batch_size)
        self.member, self.evaluation = member, evaluation
        self.shards = Shards(loader)
        super().__init__(cfg, optim, self.shards, settings, **options)
        run = SharedRun(cfg, self.optim, settings.step, failover, loader.batch_size)
        shape = settings.mesh or MeshShape()
        # Errors of these are the user's, and known before anybody has died.
        self.sharing: Sharing = StageSharing(run, shape) if shape.stage > 1 else RowSharing(run)
        self._own_callbacks = list(self.reporter.callbacks)
        self.ledger = None if self.folder is None else Ledger(self.folder, member.worker)
        # What is committed: the state on the devices of this world, and the one before where that is needed, each with its
        # step and notes; or their parts on the host between worlds.
        self._states: list[tuple[int, TrainState, dict[str, Any]]] = []
        self._kept: list[Version] = []
        self._changing = False
        self._told: dict[int, tuple[int, ...]] | None = None
        self._foreseen = Foreseen()

    def _take_devices(self) -> None:
        # There are none before the first world.
        self.place, self.scatterer, self._slices = None, None, 1

    def run(self) -> FitResult:
        """Train to the end, or to a signal, through as many worlds as it takes."""
        with ExitStack() as stack:
            request = stack.enter_context(StopRequest())
            stack.callback(self.reporter.stop_trace)
            if self.ledger is not None:
                stack.callback(self.ledger.close)
            stack.callback(self._foreseen.end)
            while True:
                result = None
                try:
                    with ExitStack() as inside:
                        state = self._enter(inside)
                        result = self._train(state, request)
                except Exception as error:
                    if not lost_peer(error):
                        raise
                    self.member.failed(error)
                # Outside of the handler: what was raised holds frames, these the devices, and connections to peers stay
                # open with them, so that those further away would wait in vain.
                state = None
                if result is not None and self.member.finish():
                    return result
                self._keep()

    def _train(self, state: TrainState, request: StopRequest) -> FitResult | None:
        state = self._loop(state, request)
        if self._changing:
            return None
        interrupted = self._close(state, request)
        if self.checkpoints is not None:
            self.checkpoints.wait()
        return self._result(self.sharing.gather(state.params), interrupted)

    # From world to world

    def _keep(self) -> None:
        """The committed state to the host, and nothing else of the world."""
        self._foreseen.end()
        if self._states:
            # What has been told of the last step since.
            done, state, _ = self._states[-1]
            self._states[-1] = done, state, self._notes()
            self._kept = [
                Version(done, self.sharing.parts(state), notes) for done, state, notes in self._states
            ]
        self._elapsed_before = self.reporter.clock.elapsed
        self._states, self._compiled, self._compiled_for = [], None, None
        self.place = self.evaluate = None
        self.sharing.leave()

    def _begin_anew(self) -> None:
        """Before a state that nobody carried: what earlier worlds have counted is lost with them."""
        self.resume = self.resume or bool(self._told)
        self.step = self.reporter.tokens_seen = 0
        self._elapsed_before = self._evaluated_at = self._saved_at = 0.0
        self._saved_step = self._evaluated_step = None

    def _notes(self) -> dict[str, Any]:
        return {
            "tokens_seen": self.reporter.tokens_seen,
            "elapsed": self.reporter.clock.elapsed,
            "evaluated_at": self._evaluated_at,
            "saved_at": self._saved_at,
        }

    def _enter(self, stack: ExitStack) -> TrainState:
        self._changing, self._agreed, self.checkpoints = False, None, None
        self._settle()
        carried = carry(self._kept, tuple(self.sharing.wanted), self.sharing.like)
        if carried is None:
            # New, or of a checkpoint: whole on one device, cut there.
            self.place = Placement(make_mesh(MeshShape(), jax.local_devices()[:1]))
            self._begin_anew()
            parts = self.sharing.cut(self._start())
            self.place = self.sharing.place
        else:
            parts, self.step = carried.parts, carried.step
            self.reporter.tokens_seen = carried.notes["tokens_seen"]
            self._elapsed_before = carried.notes["elapsed"]
            self._evaluated_at, self._saved_at = carried.notes["evaluated_at"], carried.notes["saved_at"]
            self.reporter.clock = Clock(self._elapsed_before)
            if self.folder is not None:
                self.checkpoints = self._open_checkpoints(self.folder)
        state = self.sharing.put(parts)
        self.shards.restore(self.shards.state() | {"step": self.step})
        self._states, self._kept = [(self.step, state, {})], []
        if self.checkpoints is not None:
            stack.enter_context(self.checkpoints)
        self.reporter.callbacks = list(self._own_callbacks)
        self._open_writers(stack)
        # Before the writers close: what is in flight is committed.
        stack.callback(self.reporter.flush)
        self._use_evaluation()
        return state

    def _settle(self) -> None:
        """Go into a world that can train; those before it wait for somebody to come back."""
        while True:
            done = self._kept[-1].step if self._kept else None
            world = self.member.enter(done)
            devices = sorted(jax.devices(), key=lambda device: device.process_index)
            require(
                len(devices) == len(world.members),
                "devices",
                len(devices) // len(world.members),
                "each worker must have one; see docs/failover.md",
            )
            if self.sharing.settle(world, self.member.worker, devices):
                break
            del devices
            self.sharing.leave()
            self.member.idle(done or 0)
        self.place, self._slices = self.sharing.place, row_share(self.sharing.place.mesh)[1]
        self.shards.rows_of, self.shards.scored = self.sharing.rows, self.sharing.scored

    def _tell(self) -> None:
        """Say who does what when that has changed."""
        jobs = self.sharing.jobs(self.step)
        if jobs != self._told:
            self._told = jobs
            self.reporter.emit(AssignmentEvent(self.step, self.member.workers, jobs, self.sharing.stages))

    def _use_evaluation(self) -> None:
        if self.evaluation is not None:
            whole = self.evaluation()
            # Each worker evaluates for itself, on its own copy.
            self.evaluate = lambda params, step: whole(self.sharing.gather(params), step)

    # What the loop asks for

    def _next(self) -> Any:
        self.member.stepping(self.step)
        self._tell()
        given = super()._next()
        # Rows of idle slots are no rows of the run.
        self.reporter.shape = self.shards.loader.batch_size, self.reporter.shape[1]
        return given

    def _make_step(self) -> Any:
        return self.sharing.make_step()

    def _compile(self, state: Any, batch: Any, scattered: Any) -> None:
        super()._compile(state, batch, scattered)
        # The first collective has a bound, which those who took longer to compile must not exceed.
        self._changing = not self.member.together()

    def _plan(self, scattered: Any) -> TrainPlan | None:
        return self.sharing.plan(super()._plan(scattered), self._states[-1][1].params, self.step)

    def _advance(
        self, state: TrainState, batch: PackedBatch, plan: TrainPlan | None
    ) -> tuple[TrainState, Metrics]:
        if self.ledger is not None:
            updates = int(np.asarray(state.step.addressable_data(0)))
            counted = self.sharing.counted(self.step)
            self.ledger.begin(self.step, updates, self.member.generation, counted)
        notes = self._notes()
        new, metrics = jax.block_until_ready(self._compiled(state, batch, plan))
        # Only now it is committed: a step that fails leaves what was. Others may have failed in it, and whoever ends the
        # next one knows that all have committed this one.
        before = [(self.step, state, notes)] if self.sharing.keeps_before else []
        self._states = [*before, (self.step + 1, new, {})]
        self.member.stepped(self.step + 1)
        self._foresee(batch)
        return new, metrics

    def _foresee(self, batch: PackedBatch) -> None:
        """Compile for the loss of one worker and of two; worker 0's processes alone write into the persistent cache."""
        if jax.config.values["jax_compilation_cache_dir"] is None or jax.process_index():
            return
        # Of the whole batch in any world: idle slots are no rows of the run.
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.shards.loader.batch_size, *x.shape[1:]), x.dtype), batch
        )
        self._foreseen.begin(self.sharing.programs(rows, super()._plan(None)))
        for members, seconds in self._foreseen.ready():
            self.reporter.emit(ForeseenEvent(members, seconds))

    def _between(self, state: TrainState) -> None:
        # The step is done, and its line in the metrics need not wait for the next: its writer may not live to see that.
        self.reporter.flush()
        super()._between(state)

    def _goes_on(self) -> bool:
        return super()._goes_on() and not self._changing

    def _keep_together(self, request: StopRequest) -> None:
        """As the trainer's; and leave a sound world at the same step as the others."""
        if self._changing:
            return
        given = (
            int(1000 * self.reporter.clock.elapsed),
            int(request.name is not None),
            int(self.member.changing),
        )
        elapsed, stop, change = agreed(*given)
        self._agreed, self._changing = elapsed / 1000, bool(change)
        self._stopped = request.name or ("a signal to another process" if stop else None)

    # Checkpoints, for the case that nobody is left

    def _open_checkpoints(self, folder: Path) -> Checkpoints:
        return Checkpoints(folder / "checkpoints", max_to_keep=self.settings.keep, alone=True)

    def _write(self, checkpoints: Checkpoints, state: TrainState) -> None:
        """Rank 0 writes, alone: a barrier with those who may die would be one more thing to recover from."""
        whole = self.sharing.gather(state)
        if jax.process_index() == 0 and self.step not in checkpoints.steps():
            super()._write(checkpoints, jax.tree.unflatten(jax.tree.structure(state), host_leaves(whole)))


def elastic_fit(
    member: Member,
    failover: FailoverSettings,
    cfg: ModelConfig,
    optim: OptimConfig,
    loader: Addressed,
    settings: TrainSettings,
    *,
    folder: Path | str | None = None,
    evaluation: Callable[[], Evaluate] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
    params: Params | None = None,
    files: dict[str, bytes] | None = None,
) -> FitResult:
    """Train as :func:`jaxllm.train.trainer.fit` does, as one of several workers that may die, hang and come back.

    While all live, steps are those of ``fit``. What is committed is never donated, so that a step in which a worker is lost
    leaves it as it was; those who are left go on from it at once, with every shard of every batch.

    Args:
        member: of a supervisor's workers; each must have one device.
        failover: what becomes of the shards of dead workers.
        loader: of the whole batch, in every worker; shard i of n are rows i B/n to (i + 1) B/n - 1.
        evaluation: makes what ``fit`` calls ``evaluate``, anew in each world, for parameters on one device.

    The other arguments, what is returned (on one device) and what is raised are those of ``fit``.
    """
    return ElasticTrainer(
        member,
        failover,
        cfg,
        optim,
        loader,
        settings,
        folder=folder,
        evaluation=evaluation,
        callbacks=callbacks,
        resume=resume,
        params=params,
        files=files,
    ).run()
