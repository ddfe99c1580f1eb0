"""Pipelines that have lost devices, as chains of those that live: the arrays that a step over all of them reads.

A dead stage is run by an adjacent one, so that the stages of a device always follow each other and a replica's living
devices, in the order of their stages, are a chain: what one makes of a microbatch goes to the next device of the mesh.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from parallel.failover.assignment import StageAssignment

# Of the stage slots of a device: its own, and one that it has adopted.
SLOTS = 2


class Chains(NamedTuple):
    """What each of the N living devices does in a step, in the order of the mesh: by replica, then by stage.

    Attributes:
        stages: i32[N, k], ascending; -1: the slot is idle, as all slots of a dropped replica are.
        replica: i32[N].
        position: i32[N]; devices of its replica before it.
        last: bool[N]; whether its replica's output leaves here.
        degraded: bool[N]; whether it runs more than its own stage.
    """

    stages: Int32[np.ndarray, "N k"]
    replica: Int32[np.ndarray, " N"]
    position: Int32[np.ndarray, " N"]
    last: Bool[np.ndarray, " N"]
    degraded: Bool[np.ndarray, " N"]


def chain(assignment: StageAssignment, slots: int = SLOTS) -> Chains:
    """The arrays of an assignment.

    Raises:
        ValueError: a device runs more stages than ``slots``, or every replica is dropped.
    """
    if len(assignment.dropped) == assignment.replicas:
        raise ValueError(
            f"live: none of the {assignment.replicas} replicas has a neighbour of its own for each dead stage; "
            "go to a checkpoint, or wait for a device"
        )
    most = max(map(len, assignment.tasks))
    if most > slots:
        raise ValueError(f"slots={slots}: a living device runs {most} stages; give it as many slots")
    stages = np.full((len(assignment.live), slots), -1, np.int32)
    position = np.zeros(len(assignment.live), np.int32)
    for at, tasks in enumerate(assignment.tasks):
        stages[at, : len(tasks)] = sorted(task.stage for task in tasks)
        if tasks and stages[at, 0] > 0:
            position[at] = position[at - 1] + 1
    replica = np.asarray([node.replica for node in assignment.live], np.int32)
    last = (stages == assignment.stages - 1).any(axis=1)
    return Chains(stages, replica, position, last, np.asarray(assignment.degraded))


def rows_of(assignment: StageAssignment, batch: int) -> Int32[np.ndarray, "N rows"]:
    """Rows of a global batch that each living device reads: its replica's; -1: the replica is dropped.

    Args:
        assignment: who runs what.
        batch: B; replica i trains the rows i B/R to (i+1) B/R - 1. Nobody trains those of a dropped one in this step.

    Raises:
        ValueError: the replicas cannot share the rows equally.
    """
    if batch < 1 or batch % assignment.replicas:
        raise ValueError(
            f"batch={batch} rows: must be a multiple of replicas={assignment.replicas}, dropped ones counted"
        )
    rows = batch // assignment.replicas
    first = np.asarray([node.replica * rows for node in assignment.live], np.int32)
    works = np.asarray([bool(tasks) for tasks in assignment.tasks])
    return np.where(works[:, None], first[:, None] + np.arange(rows, dtype=np.int32), -1).astype(np.int32)


def moved(old: Int[np.ndarray, "N k"], new: Int[np.ndarray, "M l"]) -> Int32[np.ndarray, " M*l"]:
    """The slot of layout ``old``, rows after rows, that has what each slot of ``new`` needs; -1 for idle ones.

    Args:
        old: stage in each slot, -1 where nothing is, or where it is lost.
        new: stage in each slot, -1 where nothing shall be.

    Raises:
        ValueError: nobody has a stage.
    """
    holders = {int(stage): at for at, stage in reversed(list(enumerate(old.ravel())))}
    wanted = new.ravel().tolist()
    missing = sorted(set(wanted) - set(holders) - {-1})
    if missing:
        raise ValueError(f"stages {missing}: no living device of any replica has them; go to a checkpoint")
    return np.asarray([-1 if stage < 0 else holders[stage] for stage in wanted], np.int32)


def holders(chains: Chains) -> Int32[np.ndarray, "N k"]:
    """``chains.stages`` with -1 in every slot but the first one of each stage: who speaks for it where copies are alike."""
    flat = chains.stages.ravel()
    seen = np.isin(np.arange(flat.size), np.unique(flat, return_index=True)[1])
    return np.where(seen, flat, -1).astype(np.int32).reshape(chains.stages.shape)


def firsts(stages: Int[Array, " slots"]) -> Bool[Array, " slots"]:
    """Of all slots the first one of each stage: what has copies elsewhere counts once."""
    same = stages[:, None] == stages[None, :]
    return (stages >= 0) & ~jnp.any(jnp.tril(same, -1), axis=1)


def sum_by_stage(x: Float[Array, "k ..."], mine: Int[Array, " k"], stages: int, axis: str) -> Array:
    """Sums over all slots of the same stage; call it under ``shard_map``.

    One stage after the other goes through an all-reduce of every device, as who has it is data. All copies get the
    same bits, and idle slots zeros.

    Args:
        x: [k, ...] of this device's slots.
        mine: their stages.
        stages: of a pipeline.
        axis: of the mesh.
    """

    def add(stage: Any, out: Array) -> Array:
        here = (mine == stage).reshape(-1, *[1] * (x.ndim - 1))
        total = jax.lax.psum(jnp.sum(jnp.where(here, x, 0), axis=0), axis)
        return jnp.where(here, total, out)

    return jax.lax.fori_loop(0, stages, add, jnp.zeros_like(x))


def take_rows(index: Int[np.ndarray, "N rows"], x: np.ndarray, fill: Any = 0) -> np.ndarray:
    """``x`` by :func:`rows_of`, [N * rows, ...]; ``fill`` where there is none."""
    flat = index.ravel()
    there = (flat >= 0).reshape(-1, *[1] * (x.ndim - 1))
    return np.where(there, x[np.maximum(flat, 0)], fill).astype(x.dtype)


def lost(chains: Chains, dead: Sequence[int]) -> Int32[np.ndarray, "N k"]:
    """``chains.stages`` when the devices ``dead`` of its mesh are gone with what they had."""
    stages = chains.stages.copy()
    stages[list(dead)] = -1
    return stages
