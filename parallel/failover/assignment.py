"""Which living worker trains what the dead ones leave: pure functions of who lives and of a counter that rotates.

Data parallel (:func:`assign`): every worker holds the whole model, so any of them can train another one's share of the
batch; orphaned shards go to the next living workers of the ring. Pipelines (:func:`assign_stages`): a stage is adopted by
the adjacent one of the same replica, as published.
"""

import itertools
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32


@dataclass(frozen=True)
class Assignment:
    """Who trains which shard of every global batch.

    Attributes:
        workers: n; shard i of a batch is what worker i trains while all live.
        live: ascending; its index is the rank in the shrunken world.
        jobs: shards of each living worker, its own first.
    """

    workers: int
    live: tuple[int, ...]
    jobs: tuple[tuple[int, ...], ...]

    @property
    def slots(self) -> int:
        """Most jobs of one worker: ceil(n / m) for m living ones."""
        return max(map(len, self.jobs))

    @property
    def degraded(self) -> tuple[bool, ...]:
        """Of each living worker: if it has more than one job."""
        return tuple(len(jobs) > 1 for jobs in self.jobs)


class Rows(NamedTuple):
    """Rows of a global batch laid out over the slots of the living workers.

    Attributes:
        index: i32[m, k, B/n], the row of the batch that stands there; -1: the slot is idle.
        jobs: i32[m], busy slots of each living worker; they come first.
    """

    index: Int32[np.ndarray, "m k rows"]
    jobs: Int32[np.ndarray, " m"]


def assign(workers: int, live: Sequence[int], rotation: int = 0) -> Assignment:
    """Orphaned shards to living workers: none has two jobs more than another.

    At rotation 0 an orphan goes to the next living worker of the ring, or to the one after where that has been taken.
    Every further rotation goes on where the last one ended, so that after any number of them no living worker has
    adopted more than one shard more than another.

    Args:
        workers: n, living and dead.
        live: ranks that live, in any order.
        rotation: a step counter divided by the steps that one rotation shall last.

    Raises:
        ValueError: nobody lives, a rank stands there twice or outside 0..n-1, or a count is negative.
    """
    alive = _ranks(workers, live)
    _check_rotation(rotation)
    orphans = sorted(set(range(workers)) - set(alive))
    adopted: dict[int, list[int]] = {rank: [] for rank in alive}
    order = _by_nearness(workers, alive, orphans)
    for turn, shard in enumerate(orphans, start=rotation * len(orphans)):
        adopted[order[turn % len(order)]].append(shard)
    return Assignment(workers, alive, tuple((rank, *adopted[rank]) for rank in alive))


def lay_out(assignment: Assignment, batch: int) -> Rows:
    """Where every row of a global batch stands, shard i being rows i B/n to (i+1) B/n - 1.

    Args:
        assignment: who trains which shard.
        batch: B, rows of the global batch.

    Raises:
        ValueError: the workers cannot share the rows equally.
    """
    n, m = assignment.workers, len(assignment.live)
    if batch < 1 or batch % n:
        raise ValueError(
            f"batch={batch} rows: must be a multiple of workers={n}, dead ones counted, for shards of one size"
        )
    rows = batch // n
    index = np.full((m, assignment.slots, rows), -1, np.int32)
    for rank, jobs in enumerate(assignment.jobs):
        index[rank, : len(jobs)] = np.asarray(jobs, np.int32)[:, None] * rows + np.arange(
            rows, dtype=np.int32
        )
    return Rows(index, np.asarray([len(jobs) for jobs in assignment.jobs], np.int32))


class Node(NamedTuple):
    """A device of a pipeline, or the layers that it owns while all live."""

    replica: int
    stage: int


@dataclass(frozen=True)
class StageAssignment:
    """Who runs which stage of which replica for a step.

    Attributes:
        replicas: how many.
        stages: of each.
        live: ascending.
        tasks: stages of each living node, its own first; none where its replica is dropped.
        dropped: replicas in which a dead stage has no neighbour of its own; they train nothing in this step.
    """

    replicas: int
    stages: int
    live: tuple[Node, ...]
    tasks: tuple[tuple[Node, ...], ...]
    dropped: tuple[int, ...]

    @property
    def degraded(self) -> tuple[bool, ...]:
        """Of each living node: if it runs more than its own stage."""
        return tuple(len(tasks) > 1 for tasks in self.tasks)


def assign_stages(
    replicas: int, stages: int, live: Sequence[tuple[int, int]], rotation: int = 0
) -> StageAssignment:
    """The adjacent stage of the same replica adopts a dead one: the one before it at rotation 0.

    No node adopts two. Where dead stages share living neighbours and there is one neighbour more than needed, each of
    these is left out in turn as ``rotation`` counts on. A replica with a dead stage that no neighbour is left for is
    dropped, and said to be.

    Args:
        replicas: how many, living and dead.
        stages: of each.
        live: (replica, stage) of the nodes that live, in any order.
        rotation: a step counter divided by the steps that one rotation shall last.

    Raises:
        ValueError: no node lives, a node stands there twice or outside the grid, or a count is negative.
    """
    alive = _nodes(replicas, stages, live)
    _check_rotation(rotation)
    adopted: dict[Node, Node] = {}
    dropped = []
    for replica in range(replicas):
        owners = stage_owners({node.stage for node in alive if node.replica == replica}, stages, rotation)
        if owners is None:
            dropped.append(replica)
        else:
            adopted |= {Node(replica, owner): Node(replica, stage) for stage, owner in owners.items()}
    tasks = [
        () if node.replica in dropped else (node, *([adopted[node]] if node in adopted else []))
        for node in alive
    ]
    return StageAssignment(replicas, stages, alive, tuple(tasks), tuple(dropped))


def stage_owners(living: Set[int], stages: int, rotation: int = 0) -> dict[int, int] | None:
    """The adopting stage of each dead one of a pipeline, adjacent and all different.

    Returns:
        None where some dead stage has no neighbour of its own.
    """
    owners: dict[int, int] = {}
    for dead in _chains(living, stages):
        neighbours = [stage for stage in range(dead[0] - 1, dead[-1] + 2, 2) if stage in living]
        if len(neighbours) < len(dead):
            return None
        # As many as the dead, and each has its own; one more, and this is the one that rests.
        resting = len(dead) - rotation % (len(dead) + 1)
        if len(neighbours) > len(dead):
            neighbours.pop(resting)
        owners |= dict(zip(dead, neighbours))
    return owners


def _by_nearness(workers: int, alive: tuple[int, ...], orphans: list[int]) -> list[int]:
    """The living in the order in which they adopt: the next one after each orphan, then the next but one, and so on."""
    free = set(alive)
    order: list[int] = []
    walks = itertools.cycle([iter(range(orphan + 1, orphan + workers)) for orphan in orphans])
    while orphans and free:
        for step in next(walks):
            if step % workers in free:
                free.remove(step % workers)
                order.append(step % workers)
                break
    return order


def _chains(living: Set[int], stages: int) -> list[list[int]]:
    """Dead stages in runs of every second one: each shares a living neighbour with the next of its run."""
    chains: list[list[int]] = []
    for stage in range(stages):
        if stage in living:
            continue
        if chains and chains[-1][-1] == stage - 2:
            chains[-1].append(stage)
        else:
            chains.append([stage])
    return chains


def _ranks(workers: int, live: Sequence[int]) -> tuple[int, ...]:
    if workers < 1:
        raise ValueError(f"workers={workers}: must be at least 1")
    alive = tuple(sorted(live))
    if not alive:
        raise ValueError(f"live=(): no worker lives of {workers}; at least one must, else go to a checkpoint")
    for rank, after in zip(alive, (*alive[1:], None)):
        if not 0 <= rank < workers:
            raise ValueError(f"live names worker {rank}: ranks are 0 to {workers - 1}")
        if rank == after:
            raise ValueError(f"live names worker {rank} twice: every living rank stands there once")
    return alive


def _nodes(replicas: int, stages: int, live: Sequence[tuple[int, int]]) -> tuple[Node, ...]:
    for name, count in (("replicas", replicas), ("stages", stages)):
        if count < 1:
            raise ValueError(f"{name}={count}: must be at least 1")
    alive = tuple(Node(*node) for node in sorted(live))
    if not alive:
        raise ValueError(
            f"live=(): no node lives of {replicas} replicas x {stages} stages; at least one must, else go to a checkpoint"
        )
    for node, after in zip(alive, (*alive[1:], None)):
        if not (0 <= node.replica < replicas and 0 <= node.stage < stages):
            raise ValueError(
                f"live names replica {node.replica}, stage {node.stage}: "
                f"replicas are 0 to {replicas - 1}, stages 0 to {stages - 1}"
            )
        if node == after:
            raise ValueError(
                f"live names replica {node.replica}, stage {node.stage} twice: every living node stands there once"
            )
    return alive


def _check_rotation(rotation: int) -> None:
    if rotation < 0:
        raise ValueError(f"rotation={rotation}: must be 0 or a count of rotations so far")
