"""How the workers of an elastic run share it, world after world: by rows of each batch, each with the whole model.

:class:`jaxllm.train.stage_sharing.StageSharing` does the same for pipelines.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig, require
from jaxllm.model.functional import Params
from jaxllm.train.degraded import ranks
from jaxllm.train.failover import FailoverSettings, failover_plan, make_failover_step
from jaxllm.train.foreseen import compile_world
from jaxllm.train.optim import OptimConfig
from jaxllm.train.settings import TrainSettings
from jaxllm.train.state import TrainPlan, TrainState, abstract_state
from jaxllm.train.step import StepSettings, make_train_step
from parallel.failover.assignment import Assignment, assign, lay_out
from parallel.failover.transfer import host_leaves
from parallel.failover.world import World
from parallel.mesh import AXES, MeshShape, make_mesh
from parallel.sharding import Placement

# Steps after which the shards of dead workers go to others of the living.
ROTATION = 100


class Sharing(Protocol):
    """What an elastic run asks of the way in which workers share it.

    Attributes:
        place: the mesh of this world.
        stages: of a pipeline; 1: there is none.
        like: abstract leaves of every part of the state (:func:`parallel.failover.transfer.carry`).
        keeps_before: whether the state before the last step is needed too: nobody has the whole of the last one.
    """

    place: Placement
    stages: int
    like: Mapping[int, Any]
    keeps_before: bool

    def settle(self, world: World, worker: int, devices: Sequence[Any]) -> bool:
        """Begin a world; False: its members cannot train, and wait for another one."""
        ...

    def leave(self) -> None:
        """Drop what lies on devices."""
        ...

    @property
    def wanted(self) -> Iterable[int]:
        """Parts of the state that this worker trains on."""
        ...

    def parts(self, state: TrainState) -> dict[int, list[np.ndarray]]:
        """Copies on the host of what this worker has; no collective."""
        ...

    def put(self, parts: Mapping[int, Sequence[np.ndarray]]) -> TrainState:
        """The state on this world's devices."""
        ...

    def cut(self, state: TrainState) -> dict[int, list[np.ndarray]]:
        """The parts of a whole state."""
        ...

    def gather(self, tree: Any) -> Any:
        """The state, or a part of its tree, whole on this process's device; all members call it."""
        ...

    def rows(self, step: int) -> np.ndarray:
        """Rows of the batch that stand on this worker; -1: none."""
        ...

    def scored(self, step: int) -> bool:
        """Whether targets of these rows are read here."""
        ...

    def counted(self, step: int) -> Iterable[int]:
        """Rows of which this worker, and no other, tells that they are trained."""
        ...

    def jobs(self, step: int) -> dict[int, tuple[int, ...]]:
        """Whose work each living worker does, its own first."""
        ...

    def make_step(self) -> Any:
        """The compiled step of this world."""
        ...

    def plan(self, plan: TrainPlan | None, params: Params, step: int) -> TrainPlan | None:
        """With who does what in this step."""
        ...

    def programs(self, rows: PackedBatch, plan: TrainPlan | None) -> dict[int, Callable[[], None]]:
        """What compiles the programs of smaller worlds, by their members."""
        ...


def check_elastic(settings: TrainSettings, workers: int, batch_size: int) -> None:
    """Raise ConfigError for a run that cannot lose workers."""
    require(
        workers > 1,
        "failover",
        workers,
        "one worker has no neighbour; start at least 2 (jaxllm launch --workers)",
    )
    shape = settings.mesh or MeshShape(data=workers)
    allowed = "a lost worker's share of it has no second owner; failover shares rows, and layers, only: leave it at 1"
    for axis in AXES:
        size = getattr(shape, axis)
        require(size == 1 or axis in ("data", "stage"), f"mesh.{axis}", size, allowed)
    replicas = workers // shape.stage
    if shape.stage > 1:
        allowed = f"must divide the number of workers, {workers}: each runs one stage of a replica"
        require(workers % shape.stage == 0, "mesh.stage", shape.stage, allowed)
        allowed = f"must be workers / mesh.stage = {workers} / {shape.stage} = {replicas}"
    else:
        allowed = f"must be the number of workers, {workers}, or be left out"
    require(shape.data == replicas, "mesh.data", shape.data, allowed)
    shares = "mesh.data" if shape.stage > 1 else "workers"
    require(
        batch_size % (replicas * settings.step.accum_steps) == 0,
        "batch_size",
        batch_size,
        f"must be a multiple of {shares} * accum_steps = {replicas} * {settings.step.accum_steps}",
    )
    require(
        not settings.debug_nans,
        "debug_nans",
        True,
        "a step that fails is taken for a lost worker; leave it out",
    )


@dataclass(frozen=True)
class SharedRun:
    """What is shared.

    Attributes:
        cfg: model.
        optim: optimiser and schedule.
        step: settings of the step.
        failover: what becomes of the work of dead workers.
        batch_size: rows of the whole batch.
    """

    cfg: ModelConfig
    optim: OptimConfig
    step: StepSettings
    failover: FailoverSettings
    batch_size: int

    def __post_init__(self) -> None:
        # Raises ConfigError: these errors are the user's, and known before anybody has died.
        if self.failover.method == "mecefo":
            self.failover.skipped(self.cfg)
            ranks(self.cfg, self.failover.policy, self.failover.rank)


class RowSharing:
    """Every worker has the whole model; see :class:`Sharing`."""

    keeps_before, stages = False, 1

    def __init__(self, run: SharedRun):
        """Shares the rows of ``run``."""
        self.run, self.failover = run, run.failover
        self.like: Mapping[int, Any] = {0: abstract_state(run.cfg, run.optim)}
        self.leave()

    def settle(self, world: World, worker: int, devices: Sequence[Any]) -> bool:
        """Any member can train all rows."""
        self.world, self.devices, self.rank = world, devices, world.members.index(worker)
        self.place = Placement(make_mesh(MeshShape(data=len(devices)), devices))
        self.shrunk = len(world.members) < world.workers or self.failover.every_step
        return True

    def leave(self) -> None:
        """Bases and devices."""
        self.bases: Any = None
        self.place: Any = None
        self.devices: Sequence[Any] = ()

    @property
    def wanted(self) -> Iterable[int]:
        """All."""
        return (0,)

    def parts(self, state: TrainState) -> dict[int, list[np.ndarray]]:
        """The whole."""
        return {0: host_leaves(state)}

    def put(self, parts: Mapping[int, Sequence[np.ndarray]]) -> TrainState:
        """A copy on every device."""
        whole = NamedSharding(self.place.mesh, PartitionSpec())

        def put(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])

        return jax.tree.unflatten(jax.tree.structure(self.like[0]), [put(leaf) for leaf in parts[0]])

    def cut(self, state: TrainState) -> dict[int, list[np.ndarray]]:
        """The whole."""
        return self.parts(state)

    def gather(self, tree: Any) -> Any:
        """This process's copy."""
        return jax.tree.map(lambda x: x.addressable_data(0), tree)

    def _assignment(self, step: int) -> Assignment:
        """Who trains which shard in a step."""
        found = assign(self.world.workers, self.world.members, step // ROTATION)
        return replace(found, jobs=self.failover.jobs(found.jobs))

    def rows(self, step: int) -> np.ndarray:
        """Of its slots, one after the other."""
        return lay_out(self._assignment(step), self.run.batch_size).index[self.rank].reshape(-1)

    def scored(self, step: int) -> bool:
        """All."""
        return True

    def counted(self, step: int) -> Iterable[int]:
        """All."""
        return self.rows(step).tolist()

    def jobs(self, step: int) -> dict[int, tuple[int, ...]]:
        """Shards of each living worker."""
        found = self._assignment(step)
        return dict(zip(found.live, found.jobs, strict=True))

    def make_step(self) -> Any:
        """Of the healthy world, or with slots."""
        given = self.run.cfg, self.run.optim, self.run.step
        if self.shrunk:
            return make_failover_step(*given, self.failover, self.place)
        return make_train_step(*given, place=self.place, donate=False)

    def plan(self, plan: TrainPlan | None, params: Params, step: int) -> TrainPlan | None:
        """With the shards in the slots, where there are any."""
        if not self.shrunk:
            return plan
        slots = self._assignment(0).slots
        if self.failover.method == "mecefo" and (self.bases is None or step % self.failover.refresh == 0):
            self.bases = self.failover.make_bases(self.run.cfg)(params, self.bases)
        found = failover_plan(self._assignment(step).jobs, slots, self.bases)
        return replace(plan or TrainPlan(), failover=found)

    def programs(self, rows: PackedBatch, plan: TrainPlan | None) -> dict[int, Callable[[], None]]:
        """For the loss of one worker and of two."""
        given = self.run.cfg, self.run.optim, self.run.step, self.failover, rows, plan
        sizes = [size for size in (len(self.devices) - 1, len(self.devices) - 2) if size > 0]
        return {
            size: partial(compile_world, *given, self.devices[:size], self.world.workers) for size in sizes
        }
