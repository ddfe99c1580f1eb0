"""Lanes against brute force over tokens: what each holds, follows and looks back on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.context import STRATEGIES, Lanes, PlanConfig, contiguous_lanes, layout, make_lanes, make_plan

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
CONFIGS = st.builds(
    PlanConfig,
    workers=st.integers(1, 8),
    block=st.integers(1, 9),
    strategy=st.sampled_from(STRATEGIES),
)


def lane_tokens(index: np.ndarray, lanes: Lanes) -> np.ndarray:
    """i64[N, L, block]: the token, in the concatenation of all documents, at each place of a lane; -1: none."""
    workers = len(index)
    extra = np.take_along_axis(
        index.reshape(workers, -1), np.maximum(lanes.moved, 0).reshape(workers, -1), axis=1
    )
    extra = np.where(lanes.moved >= 0, extra.reshape(lanes.moved.shape), -1)
    stays = index if not extra.shape[1] else np.where(lanes.moved_to >= 0, -1, index)
    return np.concatenate([stays, extra], axis=1)


def blocks_of(tokens: np.ndarray, ids: np.ndarray):
    """(worker, lane, number, its tokens) of every block."""
    for worker, lane in np.ndindex(ids.shape[:2]):
        for number in range(1, ids[worker, lane].max() + 1):
            yield worker, lane, number, tokens[worker, lane][ids[worker, lane] == number]


def check(lanes: Lanes, index: np.ndarray, lengths: list[int], reach: int) -> None:
    """Lanes say of the tokens ``index`` [N, S, block] what the lengths of the documents make true."""
    tokens, ids = lane_tokens(index, lanes), lanes.segment_ids
    np.testing.assert_array_equal(tokens >= 0, ids > 0)
    assert sorted(tokens[tokens >= 0]) == list(range(sum(lengths)))
    document = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    places = index.reshape(-1)
    ends = np.full(ids.shape[:2], -1)
    for worker, lane, number, own in blocks_of(tokens, ids):
        assert len(own) and (np.diff(own) == 1).all() and len(set(document[own])) == 1
        begin = starts[document[own[0]]]
        assert number == 1 or own[0] == begin
        if number == 1:
            after = lanes.after[worker, lane]
            assert (after >= 0) == (own[0] > begin)
            if after >= 0:
                place = lanes.order[after]
                assert index.reshape(-1, index.shape[2])[place, -1] == own[0] - 1
                # A state runs through the followed place unless its document begins there.
                through = own[0] - index.shape[2] > begin
                assert lanes.first[after] == (not through)
                assert not through or after > 0
            halo = lanes.halo[worker, lane]
            wanted = own[0] + np.arange(-reach, 0)
            np.testing.assert_array_equal(
                np.where(halo >= 0, places[halo], -1), np.where(wanted >= begin, wanted, -1)
            )
        # Ids never fall along a lane, as the scans want them.
        live = ids[worker, lane][ids[worker, lane] > 0]
        assert (np.diff(live) >= 0).all()
        if own[-1] + 1 == begin + lengths[document[own[0]]]:
            ends[worker, lane] = document[own[0]]
        else:
            ends[worker, lane] = -1
    np.testing.assert_array_equal(lanes.ends, ends)
    # In the order of the documents, each followed by one lane.
    order = lanes.order[lanes.order >= 0]
    np.testing.assert_array_equal(lanes.order[: len(order)], order)
    assert (np.diff(index.reshape(-1, index.shape[2])[order, -1]) > 0).all()
    assert sorted(lanes.after[lanes.after >= 0]) == list(range(len(order)))
    assert not lanes.first[len(order) :].any()


@given(LENGTHS, CONFIGS, st.integers(0, 5))
def test_lanes_hold_every_token_once_and_only_first_blocks_go_on(lengths, config, reach):
    plan = make_plan(lengths, config)
    check(make_lanes(plan, reach=reach), layout(plan).index, lengths, reach)


@given(LENGTHS, st.integers(1, 8), st.integers(0, 5), st.integers(0, 20))
def test_contiguous_lanes_are_stretches_of_the_packed_documents(lengths, workers, reach, share):
    lanes = contiguous_lanes(lengths, workers, reach=reach, share=share)
    size = lanes.segment_ids.shape[2]
    assert size == max(share, -(-sum(lengths) // workers))
    index = np.arange(workers * size)
    check(lanes, np.where(index < sum(lengths), index, -1).reshape(workers, 1, size), lengths, reach)
    np.testing.assert_array_equal(
        lanes.order[lanes.after[lanes.after >= 0]], np.nonzero(lanes.after >= 0)[0] - 1
    )


@given(LENGTHS, CONFIGS)
def test_order_is_that_of_the_documents(lengths, config):
    plan = make_plan(lengths, config)
    lanes, where = make_lanes(plan), layout(plan)
    order = lanes.order[lanes.order >= 0]
    np.testing.assert_array_equal(lanes.order[: len(order)], order)
    begins = where.index.reshape(-1, config.block)[order, 0]
    followed = [
        start + at
        for start, length in zip(np.cumsum(lengths) - lengths, lengths)
        for at in range(0, length - config.block, config.block)
    ]
    assert begins.tolist() == followed
    np.testing.assert_array_equal(
        lanes.first[: len(order)], where.positions.reshape(-1, config.block)[order, 0] == 0
    )
    assert not lanes.first[len(order) :].any()


@given(LENGTHS, CONFIGS)
def test_moved_tokens_have_their_way_back(lengths, config):
    lanes = make_lanes(make_plan(lengths, config))
    for moved, back in zip(lanes.moved, lanes.moved_to):
        if not moved.size:
            assert not back.size
            continue
        moved, back = moved.reshape(-1), back.reshape(-1)
        np.testing.assert_array_equal(back[moved[moved >= 0]], np.flatnonzero(moved >= 0))
        assert (back >= 0).sum() == (moved >= 0).sum()


def test_only_second_tails_need_a_lane_of_their_own():
    # Tails of 3 and 4 tokens share a slot, a document of 1 token comes behind them.
    plan = make_plan([11, 12, 1], PlanConfig(1, block=8))
    lanes = make_lanes(plan)
    assert plan.capacity.slots == 3 and lanes.moved.shape == (1, 1, 8)
    tails = [lane for lane in lanes.segment_ids[0].tolist() if lane[-1] == 0 or lane[-1] == 2]
    assert sorted(sum(n > 0 for n in lane) for lane in tails) == [4, 4] or sorted(
        sum(n > 0 for n in lane) for lane in tails
    ) == [3, 5]
    assert make_lanes(make_plan([16, 8, 3], PlanConfig(2, block=8))).moved.shape[1] == 0


def test_more_lanes_change_shapes_only():
    plan = make_plan([20, 7, 3], PlanConfig(2, block=4))
    lanes, wide = make_lanes(plan), make_lanes(plan, extra=3)
    assert wide.moved.shape == (2, 3, 4) and wide.after.shape[1] == plan.capacity.slots + 3
    used = lanes.after.shape[1]
    for name in ("segment_ids", "after", "halo", "ends"):
        np.testing.assert_array_equal(getattr(wide, name)[:, :used], getattr(lanes, name))
    assert (wide.after[:, used:] == -1).all() and not wide.segment_ids[:, used:].any()
    for one, other in zip(wide, make_lanes(make_plan([1], PlanConfig(2, block=4), plan.capacity), extra=3)):
        assert one.shape == other.shape and one.dtype == other.dtype


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_lanes(make_plan([5], PlanConfig(1, block=4)), reach=-1), "lanes reach=-1"),
        (lambda: make_lanes(make_plan([5], PlanConfig(1, block=4)), extra=-1), "lanes extra=-1"),
        (lambda: contiguous_lanes([5], 2, reach=-1), "lanes reach=-1"),
        (lambda: contiguous_lanes([5], 2, share=-1), "lanes share=-1"),
        (lambda: contiguous_lanes([5], 0), "workers=0"),
        (lambda: contiguous_lanes([], 2), "at least one document"),
        (lambda: contiguous_lanes([5, 0], 2), r"lengths\[1\]=0"),
    ],
)
def test_errors_name_what_was_given(call, words):
    with pytest.raises(ValueError, match=words):
        call()
