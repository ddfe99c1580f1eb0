"""Pipelines that have lost devices as chains of the living: every stage once, in order, and nothing lost in a move."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.failover.assignment import assign_stages
from parallel.failover.chains import chain, firsts, lost, moved, rows_of, take_rows


@st.composite
def worlds(draw):
    """Arguments of :func:`assign_stages` with which one replica at least goes on."""
    replicas, stages = draw(st.integers(1, 4)), draw(st.integers(2, 7))
    grid = list(itertools.product(range(replicas), range(stages)))
    dead = draw(st.lists(st.sampled_from(grid), unique=True))[:4]
    whole = draw(st.integers(0, replicas - 1))
    live = [node for node in grid if node not in dead or node[0] == whole]
    return replicas, stages, live, draw(st.integers(0, 9))


@settings(max_examples=150)
@given(worlds())
def test_a_microbatch_that_goes_from_device_to_device_meets_every_stage_in_order(world):
    found = assign_stages(*world)
    chains = chain(found)
    for replica in range(found.replicas):
        met = []
        for at, node in enumerate(found.live):
            assert chains.replica[at] == node.replica
            if node.replica != replica or replica in found.dropped:
                continue
            # The next device of the mesh is the next of the chain: a microbatch only ever moves on by one.
            if chains.position[at] > 0:
                assert chains.replica[at - 1] == replica
                assert chains.position[at] == chains.position[at - 1] + 1
            own = [stage for stage in chains.stages[at].tolist() if stage >= 0]
            assert (chains.position[at] == 0) == (not met)
            assert node.stage in own and chains.degraded[at] == (len(own) > 1)
            met += own
            assert chains.last[at] == (met[-1] == found.stages - 1)
        assert met == ([] if replica in found.dropped else list(range(found.stages)))
    idle = [at for at, node in enumerate(found.live) if node.replica in found.dropped]
    assert (chains.stages[idle] == -1).all() and not chains.last[idle].any()


@settings(max_examples=100)
@given(worlds(), st.integers(1, 3))
def test_devices_read_the_rows_of_their_replica(world, rows):
    found = assign_stages(*world)
    index = rows_of(found, found.replicas * rows)
    for node, tasks, own in zip(found.live, found.tasks, index.tolist(), strict=True):
        first = node.replica * rows
        assert own == (list(range(first, first + rows)) if tasks else [-1] * rows)
    taken = take_rows(index, np.arange(found.replicas * rows)[:, None], fill=-7)
    assert taken.ravel().tolist() == np.where(index < 0, -7, index).ravel().tolist()


@settings(max_examples=100)
@given(worlds(), worlds())
def test_a_state_that_moves_is_found_again(before, after):
    old, new = (chain(assign_stages(*world)).stages for world in (before, after))
    wanted = set(new.ravel().tolist()) - {-1}
    if not wanted <= set(old.ravel().tolist()):
        with pytest.raises(ValueError, match="no living device of any replica has them"):
            moved(old, new)
        return
    source = moved(old, new)
    held = np.where(source < 0, -1, old.ravel()[source])
    assert held.tolist() == new.ravel().tolist()


@settings(max_examples=50)
@given(worlds())
def test_copies_count_once(world):
    found = assign_stages(*world)
    flat = chain(found).stages.ravel()
    # Of one size, so that one program serves all draws.
    flat = np.pad(flat, (0, 56 - len(flat)), constant_values=-1)
    once = np.asarray(firsts(jnp.asarray(flat)))
    assert sorted(flat[once].tolist()) == list(range(found.stages))


def test_what_a_lost_device_had_is_not_read():
    everyone = assign_stages(2, 2, [(0, 0), (0, 1), (1, 0), (1, 1)])
    chains = chain(everyone, slots=1)
    assert moved(lost(chains, [1]), np.array([[0, 1]])).tolist() == [0, 3]
    with pytest.raises(ValueError, match=r"stages \[1\]: no living device"):
        moved(lost(chains, [1, 3]), np.array([[0, 1]]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="slots=1: a living device runs 2 stages"):
        chain(assign_stages(1, 3, [(0, 0), (0, 1)]), slots=1)
    with pytest.raises(ValueError, match="none of the 2 replicas has a neighbour of its own"):
        chain(assign_stages(2, 3, [(0, 0), (1, 2)]))
    with pytest.raises(ValueError, match="batch=5 rows: must be a multiple of replicas=2"):
        rows_of(assign_stages(2, 1, [(0, 0), (1, 0)]), 5)
