"""An elastic run as replicas of a pipeline: worker w is stage ``w % stages`` of replica ``w // stages``.

While all live, steps are those of any run with ``mesh.stage``. Where somebody is lost, an adjacent stage runs both
(:mod:`jaxllm.train.chained`, MeCeFO, arXiv 2510.16415). The state is cut: what is stacked over layers is a part for each
stage, all else another one, so that a worker keeps, and receives, only what it runs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig, one_of
from jaxllm.model.functional import Params
from jaxllm.train.chained import (
    AXIS,
    ChainPlan,
    check_chained,
    in_stack,
    make_chained_step,
    slot_config,
    slot_shardings,
)
from jaxllm.train.failover import FailoverSettings
from jaxllm.train.placement import state_shardings
from jaxllm.train.sharing import SharedRun
from jaxllm.train.state import TrainPlan, TrainState, abstract_state
from jaxllm.train.step import make_train_step
from parallel.failover.assignment import StageAssignment, assign_stages
from parallel.failover.chains import SLOTS, Chains, chain, holders, rows_of
from parallel.failover.world import World
from parallel.mesh import AXES, MeshShape, batch_sharding, make_mesh
from parallel.order import in_turn
from parallel.sharding import Placement

# The part of the state that every worker has; the others are numbered as their stages.
COMMON = -1


class StageSharing:
    """Every worker has a stage of the model, or two; see :class:`jaxllm.train.sharing.Sharing`."""

    keeps_before = True

    def __init__(self, run: SharedRun, shape: MeshShape):
        """Raises ConfigError where the method or the pipeline does not fit the model."""
        one_of("failover.method", run.failover.method, "mecefo", "exact")
        check_chained(run.cfg, shape.stage)
        self.run, self.failover = run, run.failover
        self.replicas, self.stages = shape.data, shape.stage
        whole = abstract_state(run.cfg, run.optim)
        paths, self.structure = jax.tree_util.tree_flatten_with_path(whole)
        self.stacked = [in_stack(path) for path, _ in paths]
        self.sizes = [leaf.shape[0] // self.stages if there else 0 for (_, leaf), there in self._with(paths)]
        common = [leaf for (_, leaf), there in self._with(paths) if not there]
        stage = [
            jax.ShapeDtypeStruct((leaf.shape[0] // self.stages, *leaf.shape[1:]), leaf.dtype)
            for (_, leaf), there in self._with(paths)
            if there
        ]
        self.like: Mapping[int, Any] = {COMMON: common, **dict.fromkeys(range(self.stages), stage)}
        self.leave()

    def _with(self, leaves: Sequence[Any]) -> Iterable[tuple[Any, bool]]:
        return zip(leaves, self.stacked, strict=True)

    def settle(self, world: World, worker: int, devices: Sequence[Any]) -> bool:
        """Who runs which stage; False where no replica has a neighbour for each of its dead stages."""
        self.world, self.devices, self.rank = world, devices, world.members.index(worker)
        self.shrunk = len(world.members) < world.workers
        # State lies with who runs it, so that neighbours take turns from world to world, not within one.
        self.assignment = _assigned(self.replicas, self.stages, world.members, world.generation)
        if len(self.assignment.dropped) == self.replicas:
            return False
        self.chains = chain(self.assignment, SLOTS if self.shrunk else 1)
        shape = (
            MeshShape(data=len(devices)) if self.shrunk else MeshShape(data=self.replicas, stage=self.stages)
        )
        self.place = Placement(make_mesh(shape, devices))
        return True

    def leave(self) -> None:
        """Bases, compiled helpers and devices."""
        self.bases: Any = None
        self._refresh: Any = None
        self._gathers: dict[Any, Any] = {}
        self.place: Any = None
        self.devices: Sequence[Any] = ()

    @property
    def _mine(self) -> list[int]:
        """Stages in this worker's slots, -1 where one is idle."""
        return self.chains.stages[self.rank].tolist()

    @property
    def wanted(self) -> Iterable[int]:
        """What all have, and its stages."""
        return (COMMON, *(stage for stage in self._mine if stage >= 0))

    def parts(self, state: TrainState) -> dict[int, list[np.ndarray]]:
        """Of its slots."""
        leaves = list(self._with([leaf.addressable_data(0) for leaf in jax.tree.leaves(state)]))
        out = {COMMON: [np.array(leaf) for leaf, there in leaves if not there]}
        for slot, stage in enumerate(self._mine):
            if stage >= 0:
                cuts = [(leaf, leaf.shape[0] // len(self._mine)) for leaf, there in leaves if there]
                out[stage] = [np.array(leaf[slot * size : (slot + 1) * size]) for leaf, size in cuts]
        return out

    def put(self, parts: Mapping[int, Sequence[np.ndarray]]) -> TrainState:
        """Stages in this worker's slots; zeros where one is idle."""
        common = iter(parts[COMMON])
        held = [iter(parts[stage]) if stage >= 0 else None for stage in self._mine]
        blocks = iter(self.like[0])
        slots = self.chains.stages.size if self.shrunk else self.stages
        shardings = jax.tree.leaves(self._shardings())

        def local(there: bool) -> np.ndarray:
            if not there:
                return next(common)
            block = next(blocks)
            rows = [np.zeros(block.shape, block.dtype) if own is None else next(own) for own in held]
            return np.concatenate(rows)

        leaves = []
        for sharding, there, size in zip(shardings, self.stacked, self.sizes, strict=True):
            own = local(there)
            shape = (slots * size, *own.shape[1:]) if there else own.shape
            leaves.append(jax.make_array_from_callback(shape, sharding, lambda _, own=own: own))
        return jax.tree.unflatten(self.structure, leaves)

    def _shardings(self) -> TrainState:
        if self.shrunk:
            return slot_shardings(abstract_state(self._wide(len(self.devices)), self.run.optim), self.place)
        return state_shardings(self.run.cfg, self.run.optim, self.place)

    def _wide(self, nodes: int) -> ModelConfig:
        return slot_config(self.run.cfg, self.stages, nodes, SLOTS)

    def cut(self, state: TrainState) -> dict[int, list[np.ndarray]]:
        """Common leaves, and those of every stage."""
        leaves = list(self._with([np.asarray(leaf) for leaf in jax.tree.leaves(state)]))
        out = {COMMON: [np.array(leaf) for leaf, there in leaves if not there]}
        for stage in range(self.stages):
            out[stage] = [np.array(np.split(leaf, self.stages)[stage]) for leaf, there in leaves if there]
        return out

    def gather(self, tree: Any) -> Any:
        """Every stage from the first device that has it."""
        structure = jax.tree.structure(tree)
        if structure not in self._gathers:
            self._gathers[structure] = _make_gather(tree, self.place, self.stages)
        return self._gathers[structure](tree, holders(self.chains))

    def rows(self, step: int) -> np.ndarray:
        """Of its replica; of none where that is dropped."""
        return rows_of(self.assignment, self.run.batch_size)[self.rank]

    def scored(self, step: int) -> bool:
        """By the last of a replica; in the healthy world devices share what is scored."""
        return not self.shrunk or bool(self.chains.last[self.rank])

    def counted(self, step: int) -> Iterable[int]:
        """By who runs a replica's last stage."""
        return self.rows(step).tolist() if self.chains.last[self.rank] else ()

    def jobs(self, step: int) -> dict[int, tuple[int, ...]]:
        """Workers whose stages each living one runs."""
        tasks = [
            tuple(node.replica * self.stages + node.stage for node in own) for own in self.assignment.tasks
        ]
        return dict(zip(self.world.members, tasks, strict=True))

    def make_step(self) -> Any:
        """Of the pipeline, or of what is left of it."""
        if self.shrunk:
            return make_chained_step(
                self.run.cfg,
                self.run.optim,
                self.run.step,
                self.failover,
                place=self.place,
                stages=self.stages,
            )
        return make_train_step(self.run.cfg, self.run.optim, self.run.step, place=self.place, donate=False)

    def plan(self, plan: TrainPlan | None, params: Params, step: int) -> TrainPlan | None:
        """With the chains, where there are any."""
        if not self.shrunk:
            return plan
        if self.failover.method == "mecefo" and (self.bases is None or step % self.failover.refresh == 0):
            if self._refresh is None:
                self._refresh = _make_bases(self.run.cfg, self.failover, self.place, self.stages, params)
            self.bases = self._refresh(params, self.bases)
        return replace(plan or TrainPlan(), failover=ChainPlan(self.chains, self.bases))

    def programs(self, rows: PackedBatch, plan: TrainPlan | None) -> dict[int, Callable[[], None]]:
        """For the loss of one worker, and of one in each of two replicas."""
        found = {}
        for size in (len(self.devices) - 1, len(self.devices) - 2):
            lost = self.world.workers - size
            if 0 < lost <= self.replicas:
                gone = {replica * self.stages for replica in range(lost)}
                members = [worker for worker in range(self.world.workers) if worker not in gone]
                found[size] = partial(self._compile, members, rows, plan, self.devices[:size])
        return found

    def _compile(
        self, members: Sequence[int], rows: PackedBatch, plan: TrainPlan | None, devices: Sequence[Any]
    ) -> None:
        """What the survivors of a world will run, into the persistent cache."""
        assignment = _assigned(self.replicas, self.stages, members, 0)
        chains: Chains = chain(assignment, SLOTS)
        place = Placement(make_mesh(MeshShape(data=len(devices)), devices))
        state = abstract_state(self._wide(len(devices)), self.run.optim)
        state = _like(state, slot_shardings(state, place))
        over, bases = NamedSharding(place.mesh, P(AXIS)), None
        if self.failover.method == "mecefo":
            refresh = _make_bases(self.run.cfg, self.failover, place, self.stages, state.params).lower(
                state.params, None
            )
            refresh.compile()
            bases = _like(refresh.out_info, jax.tree.map(lambda _: over, refresh.out_info))
        count = len(devices) * rows.shape[0] // self.replicas
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (count, *x.shape[1:]), x.dtype, sharding=batch_sharding(place.mesh)
            ),
            rows,
        )
        step = make_chained_step(
            self.run.cfg, self.run.optim, self.run.step, self.failover, place=place, stages=self.stages
        )
        given = replace(plan or TrainPlan(), failover=ChainPlan(chains, bases))
        step.lower(state, shapes, given).compile()


def _assigned(replicas: int, stages: int, members: Sequence[int], rotation: int) -> StageAssignment:
    return assign_stages(replicas, stages, [divmod(worker, stages) for worker in members], rotation)


def _like(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def _make_bases(
    cfg: ModelConfig, failover: FailoverSettings, place: Placement, stages: int, params: Any
) -> Any:
    """The compiled ``(params, previous) -> bases`` of every device's own slots; no collective."""
    own = failover.make_bases(slot_config(cfg, stages, 1, SLOTS))
    specs = jax.tree.map(lambda where: where.spec, slot_shardings(params, place))
    over = jax.shard_map(own, mesh=place.mesh, in_specs=(specs, P(AXIS)), out_specs=P(AXIS), check_vma=False)
    return jax.jit(over)


def _make_gather(tree: Any, place: Placement, stages: int) -> Any:
    """``(tree, holders) -> tree`` whole on this process's device, bit by bit but for the sign of zeros.

    Sums of one stage's layers and zeros of everybody else, as who has it is data.
    """
    flags = [in_stack(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, tree)

    def local(tree: Any, where: Any) -> Any:
        mine = where[jax.lax.axis_index(AXES)]

        def whole(leaf: Any) -> Any:
            own = leaf.reshape(len(mine), -1, *leaf.shape[1:])
            out = jnp.zeros((stages + 1, *own.shape[1:]), leaf.dtype)
            out = out.at[jnp.where(mine < 0, stages, mine)].set(own)[:stages]
            return jax.lax.psum(out, AXES).reshape(-1, *leaf.shape[1:])

        leaves, structure = jax.tree.flatten(tree)
        stacked = [leaf for leaf, there in zip(leaves, flags, strict=True) if there]
        found = iter(in_turn(whole, stacked) if place.in_turn else [whole(leaf) for leaf in stacked])
        out = [next(found) if there else leaf for leaf, there in zip(leaves, flags, strict=True)]
        return jax.tree.unflatten(structure, out)

    over = jax.jit(
        jax.shard_map(local, mesh=place.mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False)
    )
    return lambda tree, where: jax.tree.map(lambda x: x.addressable_data(0), over(tree, where))
