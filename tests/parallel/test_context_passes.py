"""Backward passes in the simulator: a hand's sums, and laws that every kind of context parallelism obeys."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.context import draw_lengths
from parallel.context.costs import AttentionShape, Costs
from parallel.context.passes import steps_of
from parallel.context.rivals import causal_pairs
from parallel.context.simulate import KINDS, System, plan_for, simulate, simulate_plan
from parallel.context.timeline import Steps, play
from parallel.context.work import spread_of, work_of

SHAPE = AttentionShape(heads=8, kv_heads=2, head_dim=16)
PLANNED = [kind for kind in KINDS if kind not in ("zigzag-each", "ulysses", "magi", "grouping")]
LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=12)
WAYS = ("forward", "backward", "both")


def times(lengths, workers, kind, costs):
    return [
        simulate(np.array(lengths), workers, kind, SHAPE, costs, block=512, passes=way).seconds
        for way in WAYS
    ]


def test_gradients_leave_when_they_are_computed_and_nobody_waits_for_them():
    whole = (
        np.array([0, 1]),
        np.array([0, 1]),
        np.array([1, 0]),
        np.ones(2),
        np.zeros(2),
        np.array([1.0, 0.0]),
    )
    made = Steps(*whole, after=np.array([-1, 0]), work=np.array([[0.0, 4.0], [3.0, 0.0]]))
    # Keys come at 1, are computed after the own work from 2 to 5, and their gradients are home at 6; worker 0 goes on.
    done, free = play(made, np.zeros(2), np.array([1.0, 2.0]), True, np.inf)
    assert done.tolist() == [5.0, 5.0] and free.tolist() == [6.0, 6.0]


def test_keys_wait_for_a_slow_peer_s_gradients_only_in_one_queue():
    # Worker 1 computes for 9 s on what 0 sends it, then sends gradients home; 0 fetches from 2 meanwhile.
    made = Steps(
        step=np.array([0, 1, 2]),
        sender=np.array([0, 1, 2]),
        receiver=np.array([1, 0, 0]),
        seconds=np.ones(3),
        latency=np.zeros(3),
        size=np.zeros(3),
        after=np.array([-1, 0, -1]),
        work=np.array([[0.0, 0.0, 1.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    )
    start = np.zeros(3)
    done, free = play(made, start, start, True, np.inf, apart=False)
    assert done.tolist() == [13.0, 10.0, 0.0] and free.tolist() == [12.0, 11.0, 12.0]
    done, free = play(made, start, start, True, np.inf, apart=True)
    assert done.tolist() == [3.0, 10.0, 0.0] and free.tolist() == [11.0, 11.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
def test_one_worker_computes_two_and_a_half_times_as_long(kind):
    one, more, both = times([700, 3000, 20], 1, kind, Costs())
    assert more == pytest.approx(2.5 * one) and both == pytest.approx(one + more)


@given(LENGTHS, st.sampled_from(KINDS), st.sampled_from([2, 4, 8]))
def test_backward_takes_longer_and_both_take_the_sum(lengths, kind, workers):
    one, more, both = times(lengths, workers, kind, Costs(node=2))
    assert more > one
    if kind == "grouping":
        # Groups are searched for what they are to do, to a few parts in a hundred.
        assert both > max(one, more)
    elif kind == "magi":
        assert both >= (one + more) * (1 - 1e-9)
    else:
        assert both == pytest.approx(one + more)


@given(LENGTHS, st.sampled_from(KINDS), st.sampled_from([1, 2, 4, 8]), st.sampled_from(WAYS))
def test_shares_multiply_and_nothing_beats_the_kernel(lengths, kind, workers, way):
    costs = Costs(node=2)
    result = simulate(np.array(lengths), workers, kind, SHAPE, costs, block=512, passes=way)
    times_forward = {"forward": 1.0, "backward": 2.5, "both": 3.5}[way]
    flops = causal_pairs(np.array(lengths)).sum() * SHAPE.pair_flops * times_forward
    assert result.mfu == pytest.approx(flops / (workers * costs.peak * result.seconds))
    assert result.mfu == pytest.approx(result.kernel * result.balance * result.overlap)
    assert result.mfu <= result.kernel * (1 + 1e-9) <= costs.kernel_best * (1 + 2e-9)
    assert max(result.balance, result.overlap) <= 1 + 1e-9 and min(result.traffic, result.tokens) >= 1 - 1e-9


@given(LENGTHS, st.sampled_from(KINDS), st.sampled_from(WAYS))
def test_a_slower_network_is_never_faster(lengths, kind, way):
    # Keys wide enough that links decide.
    shape, costs = SHAPE._replace(kv_heads=8), Costs(node=1, network_latency=0.0)
    slow = [
        simulate(
            np.array(lengths), 4, kind, shape, replace(costs, network=speed), block=512, passes=way
        ).seconds
        for speed in (1e8, 1e9, 1e10)
    ]
    # Groups are found to a few parts in a hundred, by halving an interval.
    slack = 1.03 if kind == "grouping" else 1 + 1e-9
    assert slow[2] <= slow[1] * slack and slow[1] <= slow[0] * slack


@given(
    LENGTHS,
    st.sampled_from(PLANNED),
    st.sampled_from([(s, k) for s in (2, 4) for k in (False, True)]),
    st.booleans(),
)
def test_no_worker_ends_before_its_kernels_and_its_link(lengths, kind, form, apart):
    size, kept = form
    shape, costs = SHAPE._replace(gradient_bytes=size), Costs(node=2, network=1e9)
    plan = plan_for(np.array(lengths), 4, kind, costs, 512)
    system = System(reshuffle="none", kept=kept, apart=apart)
    kept &= kind.startswith("fcp")
    moves, tokens = plan.moves, plan.blocks.length[plan.moves.block]
    alone = tokens / np.where(moves.sender // 2 == moves.receiver // 2, costs.nvlink, costs.network)
    for way, there, back in (("forward", 1, 0), ("backward", 0 if kept else 1, size / 2)):
        result = simulate_plan(plan, kind, shape, costs, system, way)
        # Keys one way, gradients the other; a link carries both ways at once.
        leave = np.bincount(moves.sender, alone * there, 4) + np.bincount(moves.receiver, alone * back, 4)
        come = np.bincount(moves.receiver, alone * there, 4) + np.bincount(moves.sender, alone * back, 4)
        least = max(leave.max(), come.max()) * shape.kv_bytes
        assert result.seconds >= max(least, result.overlap * result.seconds) * (1 - 1e-9)
        assert result.received == pytest.approx(tokens.sum() * shape.kv_bytes * (there + back) / 4)


@given(LENGTHS, st.sampled_from(PLANNED), st.booleans(), st.booleans(), st.booleans())
def test_what_a_worker_lends_comes_home(lengths, kind, pipelined, kept, apart):
    plan = plan_for(np.array(lengths), 4, kind, Costs(), 512)
    spread = spread_of(plan, plan.rounds // 3, whole_runs=False)
    work = work_of(spread)
    seconds = work.pairs * 1e-9
    made = {
        way: steps_of(spread, work, seconds, way, SHAPE, Costs(), pipelined=pipelined, kept=kept, apart=apart)
        for way in ("forward", "backward")
    }
    lent, home = made["forward"], made["backward"]
    returned = home.after >= 0
    # Half of the link each, where both go.
    share = 2 if apart and not kept else 1
    for ends in (("sender", "receiver"), ("receiver", "sender")):
        one, other = (getattr(steps, end) for steps, end in zip((lent, home), ends))
        np.testing.assert_allclose(
            share * np.bincount(one, lent.seconds, 4), np.bincount(other[returned], home.seconds[returned], 4)
        )
    # Gradients of a step leave in a later one; keys come again in the same ones, or not at all.
    assert (home.step[returned] > home.after[returned]).all()
    np.testing.assert_array_equal(home.after[returned], lent.step)
    assert (~returned).sum() == (0 if kept else len(lent.step))
    assert home.work.sum() == pytest.approx(lent.work.sum())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_documents_keep_all_equally_busy(kind, way):
    lengths = np.full(8, 4096)
    result = simulate(lengths, 4, kind, SHAPE, Costs(node=2), block=512, passes=way)
    assert result.balance == pytest.approx(1, abs=0.02) and result.tokens == pytest.approx(1)


def test_keys_kept_and_short_gradients_save_time(seed):
    """Where the network decides."""
    costs = Costs(network=2e9)
    plan = plan_for(draw_lengths("log-normal", 16 * 32_768, seed), 16, "fcp", costs)

    def seconds(kept, size):
        shape = AttentionShape(gradient_bytes=size)
        system = System(kept=kept)
        return simulate_plan(plan, "fcp", shape, costs, system, "backward").seconds

    assert seconds(True, 2) < seconds(False, 2) < seconds(False, 4)
    assert simulate_plan(plan, "fcp", system=System(kept=True)) == simulate_plan(plan, "fcp")


def test_unknown_passes_are_refused():
    with pytest.raises(ValueError, match="passes='sideways': must be one of forward, backward, both"):
        simulate(np.array([10]), 2, passes="sideways")
