"""The simulator of context parallelism: its clock on cases that a hand can check, and laws that every kind obeys."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.context import PlanConfig, draw_lengths, make_plan
from parallel.context.costs import AttentionShape, Costs
from parallel.context.rivals import causal_pairs, chunked_ring, shared_heads
from parallel.context.simulate import (
    ABLATION,
    KINDS,
    System,
    plan_for,
    simulate,
    simulate_plan,
)
from parallel.context.timeline import Steps, play
from parallel.context.work import spread_of, work_of

SHAPE = AttentionShape(heads=8, kv_heads=2, head_dim=16)
PLANNED = [kind for kind in KINDS if kind not in ("zigzag-each", "ulysses", "magi", "grouping")]
LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=12)


def steps(transfers, work, seconds=1.0, latency=0.0):
    step, sender, receiver = np.array(transfers, np.int64).reshape(-1, 3).T
    full = np.full(len(step), seconds)
    ones = np.ones(len(step))
    return Steps(step, sender, receiver, full, latency * ones, ones, np.full(len(step), -1), np.array(work))


def played(made, local, pipelined=True, room=math.inf):
    return play(made, np.zeros(len(local)), np.array(local, float), pipelined, room)[0].tolist()


def test_transfers_hide_behind_local_work_and_expose_the_rest():
    one = steps([(0, 0, 1)], [[0.0], [3.0]], latency=0.5)
    assert played(one, [2.0, 4.0]) == [2.0, 7.0]
    assert played(one, [2.0, 1.0]) == [2.0, 4.5]
    # Without a pipeline it begins when both are done with their own work, and both wait for it.
    assert played(one, [2.0, 1.0], pipelined=False) == [2.0, 6.5]


def test_who_sends_twice_in_a_step_needs_twice_the_time():
    crowd = steps([(0, 0, 1), (0, 0, 2)], [[0.0], [0.0], [0.0]])
    assert played(crowd, [0.0, 0.0, 0.0]) == [0.0, 2.0, 2.0]
    rounds = steps([(0, 0, 1), (1, 0, 2)], [[0.0, 0.0]] * 3)
    assert played(rounds, [0.0, 0.0, 0.0]) == [0.0, 1.0, 2.0]


def test_a_full_receiver_makes_its_sender_wait():
    # Three blocks to worker 1, which computes 5 s on each.
    three = steps([(0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 0, 2)], [[0.0] * 4, [5.0, 5.0, 5.0, 0.0], [0.0] * 4])
    assert played(three, [0.0, 0.0, 0.0])[2] == 4.0
    # With room for one the third can begin once the second is computed, at 6 + 1 + 5.
    assert played(three, [0.0, 0.0, 0.0], room=1.0) == [0.0, 18.0, 14.0]
    assert played(three, [0.0, 0.0, 0.0], room=2.0)[2] == 8.0


@given(LENGTHS, st.sampled_from(KINDS))
def test_one_worker_only_computes(lengths, kind):
    result = simulate(np.array(lengths), 1, kind, SHAPE, block=512)
    assert result.received == 0 and result.balance == result.tokens == 1
    assert result.overlap == pytest.approx(1)


@given(LENGTHS, st.sampled_from(KINDS), st.sampled_from([1, 2, 4, 8]))
def test_shares_multiply_and_nothing_beats_perfect_balance(lengths, kind, workers):
    costs = Costs(node=2)
    result = simulate(np.array(lengths), workers, kind, SHAPE, costs, block=512)
    flops = causal_pairs(np.array(lengths)).sum() * SHAPE.pair_flops
    assert result.seconds >= flops / (workers * costs.peak * costs.kernel_best)
    assert result.mfu == pytest.approx(result.kernel * result.balance * result.overlap)
    assert result.mfu == pytest.approx(flops / (workers * costs.peak * result.seconds))
    assert max(result.kernel, result.balance, result.overlap) <= 1 + 1e-9 and result.tokens >= 1 - 1e-9


@given(LENGTHS, st.sampled_from(KINDS), st.floats(0.1, 10))
def test_a_faster_machine_is_faster_by_as_much(lengths, kind, factor):
    costs = Costs(node=2, network_latency=1e-6)
    fast = replace(
        costs,
        peak=costs.peak * factor,
        network=costs.network * factor,
        nvlink=costs.nvlink * factor,
        network_latency=costs.network_latency / factor,
        nvlink_latency=costs.nvlink_latency / factor,
    )
    one, other = (simulate(np.array(lengths), 4, kind, SHAPE, each, block=512) for each in (costs, fast))
    assert other.seconds * factor == pytest.approx(one.seconds, rel=1e-3)
    assert other.received == pytest.approx(one.received)


@given(LENGTHS, st.sampled_from(PLANNED))
def test_a_slower_network_is_never_faster(lengths, kind):
    plan = plan_for(np.array(lengths), 4, kind, Costs(), 512)
    slow = [
        simulate_plan(plan, kind, SHAPE, Costs(node=1, network=speed)).seconds for speed in (1e8, 1e9, 1e10)
    ]
    assert slow == sorted(slow, reverse=True)


@given(LENGTHS, st.sampled_from(PLANNED), st.sampled_from(list(ABLATION)))
def test_every_pair_is_work_of_a_step_that_can_bring_it(lengths, kind, name):
    plan = plan_for(np.array(lengths), 4, kind, Costs(), 512)
    step = plan.rounds // 3
    work = work_of(spread_of(plan, step, whole_runs=False))
    assert work.pairs.sum() == causal_pairs(np.array(lengths)).sum()
    steps_in = set(zip(plan.moves.receiver.tolist(), step.tolist()))
    assert set(zip(work.worker[work.step >= 0].tolist(), work.step[work.step >= 0].tolist())) <= steps_in
    assert simulate_plan(plan, kind, SHAPE, system=ABLATION[name]).seconds > 0


def test_a_document_alone_is_one_chunk_and_a_block_with_more_keys_a_larger_one():
    plan = plan_for(np.array([2048]), 1, "ring", Costs(), 512)
    assert work_of(spread_of(plan, plan.rounds, whole_runs=True)).tokens.tolist() == [2048.0] * 10
    by_block = work_of(spread_of(plan, plan.rounds, whole_runs=False))
    # Block i has i + 1 blocks of keys.
    assert sorted(set(by_block.tokens.tolist())) == [512 * math.sqrt(n) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_rings_move_the_bytes_that_are_known(workers):
    """One document over all workers: contiguous shares need those before them; unplanned rings rotate everything."""
    share = 4 * 512
    lengths = np.array([workers * share])
    size = share * SHAPE.kv_bytes
    ring = simulate(lengths, workers, "ring", SHAPE, block=512)
    assert ring.received == pytest.approx((workers - 1) / 2 * size)
    each = simulate(lengths, workers, "zigzag-each", SHAPE)
    assert each.received == (workers - 1) * size
    # Folded: whoever has the last share needs everything that is not its own, and one of the 2N has the first two.
    zigzag = simulate(lengths, workers, "zigzag", SHAPE, block=512)
    assert ring.received < zigzag.received <= each.received
    assert zigzag.balance > ring.balance
    # Equal documents of a share each need nothing from others.
    assert simulate(np.full(workers, share), workers, "ring", SHAPE, block=512).received == 0


def test_ulysses_moves_queries_keys_values_and_outputs():
    costs = Costs(node=4, network=1e9, nvlink=1e12, network_latency=0.0, nvlink_latency=0.0)
    result = simulate(np.array([4096]), 8, "ulysses", SHAPE, costs)
    # Of 7/8 of the tokens one of 8 query heads in and out, and one of 2 heads of keys and values, of 16 bf16 each.
    received = 4096 * 7 / 8 * (2 * 32 + 64)
    assert result.received == pytest.approx(received)
    compute = (
        causal_pairs(np.array([4096]))[0] * SHAPE.pair_flops / 8 / costs.rate(np.array([4096]), False)[0]
    )
    # 4 of 7 others are in the other node.
    assert result.seconds == pytest.approx(compute + received * 4 / 7 / 1e9)


@pytest.mark.parametrize("kind", PLANNED)
def test_short_documents_cost_no_communication(kind, seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 200)
    result = simulate(lengths, 8, kind, SHAPE, system=System(reshuffle="none"), block=64)
    assert result.received == 0 and result.overlap == pytest.approx(1)


def test_each_step_of_the_ablation_pays(seed):
    """Summed over batches, since a single one may lose a little by coalescing."""
    plans = [
        plan_for(draw_lengths("log-normal", 32 * 32_768, seed + i), 32, "fcp", Costs()) for i in range(4)
    ]
    seconds = [
        sum(simulate_plan(plan, "fcp", system=system).seconds for plan in plans)
        for system in ABLATION.values()
    ]
    assert all(later <= earlier * 1.001 for earlier, later in pairwise(seconds))
    assert seconds[-1] < 0.6 * seconds[0]


def test_fcp_beats_what_the_paper_compares_at_scale_but_not_what_shares_heads_in_a_node(seed):
    lengths = draw_lengths("log-normal", 128 * 32_768, seed)
    mfu = {
        kind: simulate(lengths, 128, kind).mfu
        for kind in ("fcp", "ring", "zigzag", "zigzag-each", "document")
    }
    assert max(mfu, key=mfu.__getitem__) == "fcp"
    small = draw_lengths("log-normal", 8 * 32_768, seed)
    assert simulate(small, 8, "ulysses").mfu > simulate(small, 8, "fcp").mfu


def test_groups_are_the_better_of_two_ways_and_keep_to_their_memory(seed):
    lengths = draw_lengths("log-normal", 32 * 32_768, seed)
    costs = Costs(crowding=1.5)
    found = simulate(lengths, 32, "grouping", costs=costs)
    assert found.tokens <= 1.5
    # One group of everybody is among the choices.
    shape = AttentionShape()
    whole = chunked_ring(lengths, 32, shape, costs)[0], shared_heads(lengths, 32, shape, costs)[0]
    assert found.seconds <= np.minimum(*whole).sum() * 1.05
    alone = simulate(np.full(32, 1000), 32, "grouping")
    assert alone.received == 0 and alone.balance == pytest.approx(1)


def test_a_window_saves_the_work_that_it_hides(seed):
    lengths, times = draw_lengths("log-normal", 16 * 32_768, seed), []
    for window in (None, 4096):
        plan = make_plan(lengths, PlanConfig(16, window=window))
        work = work_of(spread_of(plan, plan.rounds, whole_runs=False))
        assert work.pairs.sum() == plan.blocks.work.sum()
        times.append(simulate_plan(plan, "fcp", passes="both").seconds)
    assert times[1] < times[0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Costs(peak=0.0), "peak=0.0: must be above 0"),
        (lambda: Costs(network_latency=-1.0), "network_latency=-1.0: must be at least 0"),
        (lambda: Costs(kernel_best=1.1), "kernel_best=1.1"),
        (lambda: simulate(np.array([10]), 2, "star"), "star.*fcp, fcp-pairs"),
        (lambda: simulate(np.array([10]), 3, "ulysses"), "workers=3: must divide the 64 heads"),
    ],
)
def test_errors_name_what_was_given(call, words):
    with pytest.raises(ValueError, match=words):
        call()
