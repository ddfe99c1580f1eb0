"""Who trains what the dead leave: every shard once, nobody overburdened, everybody in turn."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.failover.assignment import Node, assign, assign_stages, lay_out


@st.composite
def worlds(draw, most: int = 12):
    """Workers, those that live, and a rotation."""
    workers = draw(st.integers(1, most))
    live = draw(st.lists(st.integers(0, workers - 1), min_size=1, unique=True))
    return workers, live, draw(st.integers(0, 50))


@st.composite
def pipelines(draw):
    """Replicas, stages, nodes that live, and a rotation."""
    replicas, stages = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    grid = list(itertools.product(range(replicas), range(stages)))
    live = draw(st.lists(st.sampled_from(grid), min_size=1, unique=True))
    return replicas, stages, live, draw(st.integers(0, 50))


@settings(max_examples=200)
@given(worlds())
def test_every_shard_is_trained_once_and_nobody_does_more_than_its_part(world):
    workers, live, rotation = world
    found = assign(workers, live, rotation)
    assert found.live == tuple(sorted(live))
    assert sorted(itertools.chain(*found.jobs)) == list(range(workers))
    assert [jobs[0] for jobs in found.jobs] == list(found.live)
    assert found.slots == -(-workers // len(live))
    assert max(map(len, found.jobs)) - min(map(len, found.jobs)) <= 1
    assert found.degraded == tuple(len(jobs) > 1 for jobs in found.jobs)
    assert found == assign(workers, live[::-1], rotation)


@settings(max_examples=100)
@given(worlds(), st.integers(1, 30))
def test_any_rotations_in_a_row_burden_all_the_living_alike(world, rotations):
    workers, live, first = world
    found = [assign(workers, live, rotation) for rotation in range(first, first + rotations)]
    adopted = Counter({rank: 0 for rank in live})
    degraded = Counter({rank: 0 for rank in live})
    for each in found:
        for rank, jobs, degrades in zip(each.live, each.jobs, each.degraded):
            adopted[rank] += len(jobs) - 1
            degraded[rank] += degrades
    for count in (adopted, degraded):
        assert max(count.values()) - min(count.values()) <= 1


def test_orphans_go_to_the_next_living_worker_of_the_ring_and_then_on():
    assert assign(4, [0, 1, 3]).jobs == ((0,), (1,), (3, 2))
    assert assign(4, [0, 1, 2]).jobs == ((0, 3), (1,), (2,))
    assert [assign(4, [0, 1, 2], rotation).degraded.index(True) for rotation in range(4)] == [0, 1, 2, 0]
    assert assign(6, [0, 2, 3, 5]).jobs == ((0,), (2, 1), (3,), (5, 4)), "two orphans, two neighbours"
    assert assign(6, [0, 3, 4, 5]).jobs == ((0,), (3, 1), (4, 2), (5,)), (
        "one neighbour of both: the next helps"
    )
    assert assign(3, [1]).jobs == ((1, 0, 2),)
    assert assign(3, [0, 1, 2], 7).jobs == ((0,), (1,), (2,))


@settings(max_examples=100)
@given(worlds(), st.integers(1, 3))
def test_rows_of_a_batch_stand_in_one_slot_each(world, rows):
    workers, live, rotation = world
    found = assign(workers, live, rotation)
    index, jobs = lay_out(found, workers * rows)
    assert index.shape == (len(live), found.slots, rows) and index.dtype == jobs.dtype == np.int32
    assert sorted(index[index >= 0].tolist()) == list(range(workers * rows))
    for rank, shards in enumerate(found.jobs):
        assert jobs[rank] == len(shards)
        assert (index[rank, jobs[rank] :] == -1).all()
        for slot, shard in enumerate(shards):
            assert index[rank, slot].tolist() == list(range(shard * rows, (shard + 1) * rows))


def _matchings(dead: list[int], living: set[int]) -> list[dict[int, int]]:
    """Every way to give each dead stage an adjacent living one of its own, by trying all."""
    ways = itertools.product(*[[s for s in (d - 1, d + 1) if s in living] for d in dead])
    return [dict(zip(dead, way)) for way in ways if len(set(way)) == len(dead)]


@settings(max_examples=200)
@given(pipelines())
def test_a_dead_stage_has_an_adjacent_owner_unless_no_way_exists(pipeline):
    replicas, stages, live, rotation = pipeline
    found = assign_stages(replicas, stages, live, rotation)
    assert found.live == tuple(sorted(live)) and found == assign_stages(
        replicas, stages, live[::-1], rotation
    )
    for replica in range(replicas):
        living = {stage for r, stage in live if r == replica}
        ways = _matchings([stage for stage in range(stages) if stage not in living], living)
        tasks = {node.stage: jobs for node, jobs in zip(found.live, found.tasks) if node.replica == replica}
        assert (replica in found.dropped) == (not ways)
        if not ways:
            assert not any(tasks.values())
            continue
        assert sorted(itertools.chain(*tasks.values())) == [Node(replica, s) for s in range(stages)]
        assert all(jobs[0] == (replica, stage) for stage, jobs in tasks.items())
        assert {jobs[1].stage: stage for stage, jobs in tasks.items() if len(jobs) > 1} in ways
        assert all(len(jobs) <= 2 for jobs in tasks.values())


def test_of_stages_that_may_help_each_rests_in_turn():
    """One dead stage: its two neighbours alternate. Stages 1 and 3 of 5: three may help, two are needed."""

    def helpers(stages, dead, rotation):
        live = [(0, stage) for stage in range(stages) if stage not in dead]
        found = assign_stages(1, stages, live, rotation)
        return [node.stage for node, degrades in zip(found.live, found.degraded) if degrades]

    assert [helpers(4, {2}, rotation) for rotation in range(3)] == [[1], [3], [1]]
    assert [helpers(5, {1, 3}, rotation) for rotation in range(4)] == [[0, 2], [0, 4], [2, 4], [0, 2]]
    assert helpers(4, {0}, 5) == [1] and helpers(4, {3}, 4) == [2], "the ends have one neighbour"


def test_a_replica_that_nobody_can_complete_is_dropped_and_said_to_be():
    live = [node for node in itertools.product(range(3), range(4)) if node not in {(1, 0), (1, 1), (2, 3)}]
    found = assign_stages(3, 4, live)
    assert found.dropped == (1,)
    assert dict(zip(found.live, found.tasks))[Node(2, 2)] == ((2, 2), (2, 3))
    assert dict(zip(found.live, found.tasks))[Node(1, 2)] == ()
    assert not dict(zip(found.live, found.degraded))[Node(1, 2)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: assign(4, []), "no worker lives of 4"),
        (lambda: assign(4, [0, 4]), "worker 4: ranks are 0 to 3"),
        (lambda: assign(4, [-1, 2]), "worker -1"),
        (lambda: assign(4, [1, 2, 1]), "worker 1 twice"),
        (lambda: assign(0, [0]), "workers=0"),
        (lambda: assign(2, [0], -1), "rotation=-1"),
        (lambda: lay_out(assign(4, [0]), 6), "batch=6 rows: must be a multiple of workers=4"),
        (lambda: lay_out(assign(4, [0]), 0), "batch=0"),
        (lambda: assign_stages(1, 2, []), "no node lives"),
        (lambda: assign_stages(1, 2, [(0, 2)]), "replica 0, stage 2: replicas are 0 to 0, stages 0 to 1"),
        (lambda: assign_stages(2, 2, [(0, 1), (0, 1)]), "stage 1 twice"),
        (lambda: assign_stages(2, 0, [(0, 0)]), "stages=0"),
        (lambda: assign_stages(1, 1, [(0, 0)], -2), "rotation=-2"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
