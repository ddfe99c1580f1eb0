"""Programs of the worlds that the next failures would leave, compiled into the persistent cache while all live."""

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig
from jaxllm.train.failover import FailoverSettings, failover_plan, make_failover_step
from jaxllm.train.optim import OptimConfig
from jaxllm.train.state import TrainPlan, abstract_state
from jaxllm.train.step import StepSettings
from parallel.failover.assignment import assign
from parallel.mesh import MeshShape, batch_sharding, make_mesh
from parallel.sharding import Placement

# Of the thread that compiles; training has the cores first.
NICENESS = 10


class Foreseen:
    """Compiles for smaller worlds, one after the other, beside training."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._ready: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, programs: Mapping[int, Callable[[], None]]) -> None:
        """Compile what is not known yet, in order.

        Args:
            programs: what compiles the programs of a world, by the number of its members.
        """
        wanted = {members: compile for members, compile in programs.items() if members not in self._known}
        if self._thread is not None or not wanted:
            return
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=(wanted,), name="foreseen", daemon=True)
        self._thread.start()

    def _run(self, wanted: Mapping[int, Callable[[], None]]) -> None:
        if hasattr(os, "setpriority"):
            # On Linux of this thread, and of those that it starts.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        for members, compile in wanted.items():
            if self._stop.is_set():
                return
            begin = time.perf_counter()
            compile()
            self._known.add(members)
            self._ready.put((members, time.perf_counter() - begin))

    def ready(self) -> list[tuple[int, float]]:
        """(members, seconds) of what was compiled since the last call."""
        found = []
        while not self._ready.empty():
            found.append(self._ready.get())
        return found

    def end(self) -> None:
        """Begin no other program, and wait for the one that is being compiled: it holds the devices of this world."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def compile_world(
    cfg: ModelConfig,
    optim: OptimConfig,
    step: StepSettings,
    failover: FailoverSettings,
    batch: PackedBatch,
    plan: TrainPlan | None,
    devices: Sequence[Any],
    workers: int,
) -> None:
    """Compile what survivors will run; with the persistent cache they will find it there.

    In a world of m members JAX numbers processes and devices from 0 on, whoever lives: its program is that of the first m
    devices of a larger world.

    Args:
        cfg: model.
        optim: optimiser and schedule.
        step: settings of the step.
        failover: what becomes of the shards of the dead.
        batch: B rows, or others of their shape.
        plan: of a step of a healthy world.
        devices: the first m of this world, in the order of ranks.
        workers: n, when all live.
    """
    mesh = make_mesh(MeshShape(data=len(devices)), devices)
    whole = NamedSharding(mesh, PartitionSpec())
    assignment = assign(workers, range(len(devices)))
    assignment = replace(assignment, jobs=failover.jobs(assignment.jobs))

    def like(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    state, bases = like(abstract_state(cfg, optim), whole), None
    if failover.method == "mecefo":
        refresh = failover.make_bases(cfg).lower(state.params, None)
        made = refresh.compile().output_shardings
        bases = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), refresh.out_info, made
        )
    rows = len(devices) * assignment.slots * (batch.shape[0] // workers)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    given = replace(plan or TrainPlan(), failover=failover_plan(assignment.jobs, assignment.slots, bases))
    jitted = make_failover_step(cfg, optim, step, failover, Placement(mesh))
    jitted.lower(state, like(shapes, batch_sharding(mesh)), given).compile()
