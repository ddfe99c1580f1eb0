"""A step's rows scattered over devices: every token once, its neighbours known, whatever groups, microbatches, strategy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.context import SCATTER_STRATEGIES, ScatterConfig, make_lanes, scatter
from parallel.context.scattered import of_a_worker


@st.composite
def rows(draw, count: int, length: int) -> np.ndarray:
    """Segment ids of rows: documents of all lengths, padding behind; some rows may be empty."""
    ids = np.zeros((count, length), np.int32)
    for row in ids:
        cuts = draw(st.lists(st.integers(1, length), max_size=5))
        end = draw(st.integers(0, length))
        row[:] = 1 + np.sum(np.arange(length)[:, None] >= np.asarray(sorted(set(cuts)), int), axis=1)
        row[end:] = 0
    return ids


CONFIGS = [(2, 2, 2, 4), (4, 1, 1, 3), (1, 2, 1, 5), (3, 1, 2, 16)]


@pytest.mark.parametrize("strategy", SCATTER_STRATEGIES)
@pytest.mark.parametrize("sizes", CONFIGS, ids=str)
@given(data=st.data())
def test_every_token_has_one_place_in_its_group_and_microbatch(strategy, sizes, data):
    workers, groups, parts, block = sizes
    config = ScatterConfig(workers, groups, parts, block, strategy, stage_rounds=2)
    length = 19
    ids = data.draw(rows(2 * groups * parts, length))
    placed = scatter(ids, config)
    scattered = placed.scattered
    assert scattered.rows == 2 and scattered.length == length
    flat = ids.reshape(-1)
    here = placed.source >= 0
    np.testing.assert_array_equal(np.sort(placed.source[here]), np.flatnonzero(flat))
    np.testing.assert_array_equal(placed.segment_ids > 0, here)
    np.testing.assert_array_equal(scattered.index >= 0, here)

    # [G, N, M, slots and blocks]: rows of its group, and of them the microbatch's.
    shape = groups, workers, parts, -1
    group, _, part, _ = np.unravel_index(
        np.arange(placed.source.size),
        (groups, workers, parts, placed.source.size // (groups * workers * parts)),
    )
    source, there = placed.source.reshape(-1), here.reshape(-1)
    row = source // length
    assert (row[there] // (2 * parts) == group[there]).all()
    assert (row[there] % parts == part[there]).all()
    index = scattered.index.reshape(-1)
    own_row = index[there] // length
    np.testing.assert_array_equal(row[there], group[there] * 2 * parts + own_row * parts + part[there])
    np.testing.assert_array_equal(index[there] % length, source[there] % length)

    # Positions count from the first token of the segment, and documents are the segments of rows.
    begins = np.arange(length) - np.array(
        [[np.argmax(r == r[t]) if r[t] else t for t in range(length)] for r in ids.reshape(-1, length)]
    )
    np.testing.assert_array_equal(placed.positions[here], begins.reshape(-1)[source[there]])
    documents: dict = {}
    names = placed.segment_ids.reshape(shape)
    for at in np.ndindex(groups, parts):
        own = names[at[0], :, at[1]]
        known = source.reshape(shape)[at[0], :, at[1]]
        for name, token in zip(own[known >= 0], known[known >= 0]):
            documents.setdefault((*at, name), set()).add((token // length, flat[token]))
    assert all(len(each) == 1 for each in documents.values())
    assert len({each.pop() for each in map(set, documents.values())}) == len(documents)


@pytest.mark.parametrize("strategy", SCATTER_STRATEGIES)
def test_another_batch_fits_where_there_is_room(strategy, seed):
    rng = np.random.default_rng(seed)
    config = ScatterConfig(2, 2, 1, 4, strategy, stage_rounds=2)
    room, shapes = None, []
    batches = [1 + np.cumsum(rng.random((4, 24)) < p, axis=1) for p in (0.05, 0.5, 0.2, 0.9)]
    for ids in batches * 2:
        placed = scatter(ids.astype(np.int32), config, room)
        room = placed.room
        shapes.append([x.shape for each in (placed.scattered.plan, placed.scattered.lanes) for x in each])
    # The second time everything has its room.
    assert shapes[4] == shapes[5] == shapes[6] == shapes[7]
    again = scatter(batches[0].astype(np.int32), config, room)
    assert again.room == room and again.scattered.exchange == placed.scattered.exchange


def test_lanes_of_shared_slots_are_those_of_the_tokens(seed):
    """A plan for one worker that two share: each lane follows the token before its first, in the other's slots too."""
    rng = np.random.default_rng(seed)
    ids = (1 + np.cumsum(rng.random((2, 40)) < 0.1, axis=1)).astype(np.int32)
    config = ScatterConfig(2, 1, 1, 4, "ulysses")
    placed = scatter(ids, config)
    lanes = placed.scattered.lanes
    slots = len(placed.source) // 2
    tokens = placed.source.reshape(-1)
    assert lanes.segment_ids.shape[:2] == (2, slots + placed.room.extra)
    for worker, lane in np.ndindex(lanes.segment_ids.shape[:2]):
        own = lanes.segment_ids[worker, lane]
        if not (own == 1).any():
            continue
        at = int(np.argmax(own == 1))
        if lane < slots:
            token = placed.source[worker * slots + lane, at]
        else:
            moved = lanes.moved[worker, lane - slots, at]
            token = placed.source[worker * slots + moved // 4, moved % 4]
        before = lanes.halo[0, worker, lane]
        column = token % 40
        inside = column > 0 and ids.reshape(-1)[token - 1] == ids.reshape(-1)[token]
        if inside:
            assert tokens[before[-1]] == token - 1
            last = lanes.order[0][lanes.after[0, worker, lane]]
            assert (placed.source[last] == token - 1).any()
        else:
            assert (before == -1).all() and lanes.after[0, worker, lane] == -1


def test_lanes_belong_to_devices_or_groups():
    placed = scatter(np.ones((6, 8), np.int32), ScatterConfig(2, 3, 1, 4))
    lanes = placed.scattered.lanes
    own = make_lanes(placed.plans[1][0])
    for x, whole, mine in zip(lanes, own, of_a_worker(), strict=True):
        assert len(x) == (6 if mine else 3)
        np.testing.assert_array_equal(x[2:4] if mine else x[1], whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workers": 0}, "workers=0: must be at least 1"),
        ({"workers": 2, "strategy": "spiral"}, "strategy='spiral': must be one of fcp"),
        ({"workers": 2, "backend": "post"}, "backend='post': must be one of"),
        ({"workers": 2, "groups": 4}, "rows=6: must be a multiple of groups \\* parts = 4 \\* 1"),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        scatter(np.ones((6, 8), np.int32), ScatterConfig(**fields))
