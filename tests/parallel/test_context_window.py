"""Plans for attention through a window: nothing outside it is computed or sent, and workers' loads follow it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.context import ROUNDS, STRATEGIES, PlanConfig, draw_lengths, make_plan
from parallel.context.blocks import cut
from tests.parallel.brute_force import computed, visible

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
CONFIGS = st.builds(
    PlanConfig,
    workers=st.integers(1, 8),
    block=st.integers(1, 9),
    strategy=st.sampled_from(STRATEGIES),
    stage_rounds=st.sampled_from([1, 3, 16]),
    rounds=st.sampled_from(ROUNDS),
    window=st.integers(1, 45),
)


@given(LENGTHS, CONFIGS)
def test_every_pair_of_tokens_in_the_window_is_computed_once(lengths, config):
    plan = make_plan(lengths, config)
    np.testing.assert_array_equal(
        computed(plan, sum(lengths), config.window), visible(lengths, config.window)
    )


@given(LENGTHS, CONFIGS)
def test_a_block_travels_to_those_who_see_some_of_it(lengths, config):
    plan = make_plan(lengths, config)
    blocks, worker = plan.blocks, plan.placement.worker
    block_of = np.repeat(np.arange(len(blocks)), blocks.length)
    query, key = np.nonzero(visible(lengths, config.window))
    seen = {
        (int(worker[q]), int(k)) for q, k in zip(block_of[query], block_of[key]) if worker[q] != worker[k]
    }
    moves = plan.moves
    assert sorted(seen) == sorted(zip(moves.receiver.tolist(), moves.block.tolist()))
    np.testing.assert_array_equal(moves.sender, worker[moves.block])


@given(LENGTHS, CONFIGS)
def test_work_is_what_the_window_leaves(lengths, config):
    seen = visible(lengths, config.window)
    blocks = cut(lengths, config.block, config.window)
    starts = blocks.start
    np.testing.assert_array_equal(blocks.work, np.add.reduceat(seen.sum(1), starts))
    of_blocks = np.add.reduceat(np.add.reduceat(seen, starts, 0), starts, 1)
    np.testing.assert_array_equal(blocks.own, np.diagonal(of_blocks))
    query, key = blocks.pairs()
    np.testing.assert_array_equal(blocks.seen(query, key), of_blocks[query, key])
    assert blocks.own.sum() + blocks.seen(query, key).sum() == seen.sum()


@given(LENGTHS, CONFIGS, st.integers(0, 5))
def test_a_window_as_long_as_the_longest_document_is_none(lengths, config, more):
    wide = make_plan(lengths, replace(config, window=max(lengths) + more))
    full = make_plan(lengths, replace(config, window=None))
    for one, other in zip(wide.arrays, full.arrays):
        np.testing.assert_array_equal(one, other)
    assert wide.balance == full.balance and replace(wide.capacity, window=None) == full.capacity


def test_long_documents_cost_what_their_window_does(seed):
    busiest = np.zeros(2)
    for number in range(4):
        lengths = draw_lengths("log-normal", 16 * 32_768, seed + number)
        full, narrow = (make_plan(lengths, PlanConfig(16, window=window)) for window in (None, 4096))
        # A query block sees its own and the one before it; most of a long document travels no more.
        assert len(narrow.moves) <= narrow.balance.pairs - len(narrow.blocks) < len(narrow.blocks)
        assert len(narrow.moves) < len(full.moves)
        loads = (np.bincount(plan.placement.worker, narrow.blocks.work, 16) for plan in (full, narrow))
        busiest += [load.max() / load.mean() for load in loads]
    # Weights of full attention would give some workers more.
    assert busiest[1] < busiest[0] and busiest[1] / 4 < 1.15


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PlanConfig(2, window=0), "window=0: must be None or at least 1"),
        (lambda: cut([3], 2, 0), "window=0"),
        (
            lambda: make_plan([9], PlanConfig(2), at_least=make_plan([9], PlanConfig(2, window=4)).capacity),
            "window=4: must be the plan's None",
        ),
    ],
)
def test_errors_name_what_was_given(call, words):
    with pytest.raises(ValueError, match=words):
        call()
