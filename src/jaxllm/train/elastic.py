"""The host loop of a run whose workers may die: the trainer of one world after another, the state carried between them.

A world is what is alive at a time (:mod:`parallel.failover.membership`). In each the mesh, the step and the batches are
made anew; the committed state goes from world to world in host memory, and to those who come back over the collectives.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig, require
from jaxllm.model.functional import Params
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.clock import Clock
from jaxllm.train.degraded import ranks
from jaxllm.train.events import AssignmentEvent, Callback, ForeseenEvent
from jaxllm.train.failover import FailoverSettings, failover_plan, make_failover_step
from jaxllm.train.foreseen import Foreseen, compile_world
from jaxllm.train.interrupt import StopRequest
from jaxllm.train.ledger import Ledger
from jaxllm.train.optim import OptimConfig
from jaxllm.train.settings import FitResult, TrainSettings
from jaxllm.train.state import TrainPlan, TrainState, abstract_state
from jaxllm.train.step import Metrics, make_train_step
from jaxllm.train.trainer import Evaluate, Trainer
from parallel.distributed import agreed
from parallel.failover.assignment import Assignment, assign, lay_out
from parallel.failover.membership import Member
from parallel.failover.transfer import carry, host_leaves
from parallel.failover.world import World, lost_peer
from parallel.mesh import AXES, MeshShape, make_mesh, row_share
from parallel.sharding import Placement

# Steps after which the shards of dead workers go to others of the living.
ROTATION = 100


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

    def __next__(self) -> PackedBatch:
        batch = self.loader.rows_at(self.step, self.rows_of(self.step))
        self.step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Of the loader before the next step."""
        return self.loader.state() | {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken; raises as the loader."""
        self.loader.restore(state)
        self.step = int(state["step"])


def check_elastic(settings: TrainSettings, workers: int, batch_size: int) -> None:
    """Raise ConfigError for a run that cannot lose workers."""
    require(
        workers > 1,
        "failover",
        workers,
        "one worker has no neighbour; start at least 2 (jaxllm launch --workers)",
    )
    shape = settings.mesh or MeshShape(data=workers)
    allowed = "a lost worker's share of it has no second owner; failover shares rows only, leave it at 1"
    for axis in AXES:
        size = getattr(shape, axis)
        require(size == 1 or axis == "data", f"mesh.{axis}", size, allowed)
    allowed = f"must be the number of workers, {workers}, or be left out"
    require(shape.data == workers, "mesh.data", shape.data, allowed)
    require(
        batch_size % (workers * settings.step.accum_steps) == 0,
        "batch_size",
        batch_size,
        f"must be a multiple of workers * accum_steps = {workers} * {settings.step.accum_steps}",
    )
    require(
        not settings.debug_nans,
        "debug_nans",
        True,
        "a step that fails is taken for a lost worker; leave it out",
    )


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
        if failover.method == "mecefo":
            # Errors of these are the user's, and known before anybody has died.
            failover.skipped(cfg)
            ranks(cfg, failover.policy, failover.rank)
        self.member, self.failover, self.evaluation = member, failover, evaluation
        self.shards = Shards(loader)
        super().__init__(cfg, optim, self.shards, settings, **options)
        self._own_callbacks = list(self.reporter.callbacks)
        self.ledger = None if self.folder is None else Ledger(self.folder, member.worker)
        # What is committed: the state on the devices of this world, or its leaves on the host between worlds.
        self._state: TrainState | None = None
        self._kept: list[np.ndarray] | None = None
        self._done = 0
        self._changing = False
        self._bases: Any = None
        self._shrunk = False
        self._told: Assignment | None = None
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
        return self._result(_local(state.params), interrupted)

    # From world to world

    def _keep(self) -> None:
        """The committed state to the host, and nothing else of the world."""
        self._foreseen.end()
        if self._state is not None:
            self._kept = host_leaves(self._state)
        self._elapsed_before = self.reporter.clock.elapsed
        self._state = self._compiled = self._compiled_for = self._bases = self.place = self.evaluate = None

    def _enter(self, stack: ExitStack) -> TrainState:
        self._changing, self._agreed, self.checkpoints = False, None, None
        world = self.member.enter(None if self._kept is None else self._done)
        mesh = self._settle(world)
        notes = {
            "tokens_seen": self.reporter.tokens_seen,
            "elapsed": self._elapsed_before,
            "evaluated_at": self._evaluated_at,
            "saved_at": self._saved_at,
        }
        like = abstract_state(self.cfg, self.optim)
        carried = carry(None if self._kept is None else self._done, self._kept, notes, like)
        if carried is None:
            state = self._start()
        else:
            whole = NamedSharding(mesh, PartitionSpec())

            def put(x: np.ndarray) -> jax.Array:
                return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])

            state = jax.tree.unflatten(jax.tree.structure(like), [put(leaf) for leaf in carried.leaves])
            self.step = carried.step
            self.reporter.tokens_seen = carried.notes["tokens_seen"]
            self._elapsed_before = carried.notes["elapsed"]
            self._evaluated_at, self._saved_at = carried.notes["evaluated_at"], carried.notes["saved_at"]
            self.reporter.clock = Clock(self._elapsed_before)
            if self.folder is not None:
                self.checkpoints = self._open_checkpoints(self.folder)
        self.shards.restore(self.shards.state() | {"step": self.step})
        self._state, self._done, self._kept = state, self.step, None
        if self.checkpoints is not None:
            stack.enter_context(self.checkpoints)
        self.reporter.callbacks = list(self._own_callbacks)
        self._open_writers(stack)
        # Before the writers close: what is in flight is committed.
        stack.callback(self.reporter.flush)
        self._use_evaluation()
        return state

    def _settle(self, world: World) -> Mesh:
        """Mesh and shards of a world."""
        devices = sorted(jax.devices(), key=lambda device: device.process_index)
        require(
            len(devices) == len(world.members),
            "devices",
            len(devices) // len(world.members),
            "each worker must have one; see docs/failover.md",
        )
        self.world = world
        mesh = make_mesh(MeshShape(data=len(devices)), devices)
        self.place, self._slices = Placement(mesh), row_share(mesh)[1]
        self._shrunk = len(world.members) < world.workers or self.failover.every_step
        rank = world.members.index(self.member.worker)
        self.shards.rows_of = lambda step: (
            lay_out(self._assignment(step), self.shards.loader.batch_size).index[rank].reshape(-1)
        )
        return mesh

    def _assignment(self, step: int) -> Assignment:
        """Who trains which shard in a step."""
        found = assign(self.world.workers, self.world.members, step // ROTATION)
        return replace(found, jobs=self.failover.jobs(found.jobs))

    def _tell(self) -> None:
        """Say who does what when that has changed."""
        found = self._assignment(self.step)
        if found != self._told:
            self._told = found
            jobs = dict(zip(found.live, found.jobs, strict=True))
            self.reporter.emit(AssignmentEvent(self.step, found.workers, jobs))

    def _use_evaluation(self) -> None:
        if self.evaluation is not None:
            whole = self.evaluation()
            # Each worker evaluates for itself, on its own copy: there is nothing to wait for.
            self.evaluate = lambda params, step: whole(_local(params), step)

    # What the loop asks for

    def _next(self) -> Any:
        self.member.stepping(self.step)
        self._tell()
        given = super()._next()
        # Rows of idle slots are no rows of the run.
        self.reporter.shape = self.shards.loader.batch_size, self.reporter.shape[1]
        return given

    def _make_step(self) -> Any:
        if self._shrunk:
            return make_failover_step(self.cfg, self.optim, self.settings.step, self.failover, self.place)
        return make_train_step(self.cfg, self.optim, self.settings.step, place=self.place, donate=False)

    def _compile(self, state: Any, batch: Any, scattered: Any) -> None:
        super()._compile(state, batch, scattered)
        # The first collective has a bound, which those who took longer to compile must not exceed.
        self._changing = not self.member.together()

    def _plan(self, scattered: Any) -> TrainPlan | None:
        plan = super()._plan(scattered)
        if not self._shrunk:
            return plan
        assignment = self._assignment(self.step)
        slots = self._assignment(0).slots
        if self.failover.method == "mecefo" and (
            self._bases is None or self.step % self.failover.refresh == 0
        ):
            assert self._state is not None
            self._bases = self.failover.make_bases(self.cfg)(self._state.params, self._bases)
        return replace(plan or TrainPlan(), failover=failover_plan(assignment.jobs, slots, self._bases))

    def _advance(
        self, state: TrainState, batch: PackedBatch, plan: TrainPlan | None
    ) -> tuple[TrainState, Metrics]:
        if self.ledger is not None:
            updates = int(np.asarray(state.step.addressable_data(0)))
            rows = self.shards.rows_of(self.step)
            self.ledger.begin(self.step, updates, self.member.generation, rows.tolist())
        new, metrics = jax.block_until_ready(self._compiled(state, batch, plan))
        # Only now it is committed: a step that fails leaves what was.
        self._state, self._done = new, self.step + 1
        self.member.stepped(self._done)
        self._foresee(batch)
        return new, metrics

    def _foresee(self, batch: PackedBatch) -> None:
        """Compile for the loss of one worker and of two; worker 0's processes alone write into the persistent cache."""
        if jax.config.values["jax_compilation_cache_dir"] is None or jax.process_index():
            return
        assert self.place is not None
        devices, workers = list(self.place.mesh.devices.flat), self.world.workers
        # Of the whole batch in any world: idle slots are no rows of the run.
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.shards.loader.batch_size, *x.shape[1:]), x.dtype), batch
        )
        given = self.cfg, self.optim, self.settings.step, self.failover, rows, super()._plan(None)
        sizes = [size for size in (len(devices) - 1, len(devices) - 2) if size > 0]
        self._foreseen.begin(
            {size: partial(compile_world, *given, devices[:size], workers) for size in sizes}
        )
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
        if jax.process_index() == 0 and self.step not in checkpoints.steps():
            host = jax.tree.unflatten(jax.tree.structure(state), host_leaves(state))
            super()._write(checkpoints, host)


def _local(params: Params) -> Params:
    """This process's copy of parameters that every process has whole."""
    return jax.tree.map(lambda x: x.addressable_data(0), params)


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
