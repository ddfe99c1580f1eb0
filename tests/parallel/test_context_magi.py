"""MagiAttention in the simulator: its dispatch and its transfers against brute force over tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.context import draw_lengths
from parallel.context.magi import CHUNK, deal, magi_spread, stages
from parallel.context.simulate import simulate
from parallel.context.work import work_of
from tests.parallel.brute_force import visible

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(LENGTHS, st.integers(1, 6), st.integers(1, 12), st.integers(1, 4))
def test_chunks_receive_what_their_queries_see_and_nothing_else(lengths, workers, chunk, degree):
    spread = magi_spread(np.array(lengths), workers, chunk)
    tokens, seen = sum(lengths), visible(lengths)
    owner = np.repeat(spread.worker, spread.length)
    assert len(owner) == tokens
    # A chunk of the batch is on one worker, whatever documents it holds.
    assert all(len(set(owner[at : at + chunk])) == 1 for at in range(0, tokens, chunk))
    count = np.bincount(owner[::chunk], minlength=workers)
    assert count.max() <= -(-len(owner[::chunk]) // workers)
    work = work_of(spread)
    np.testing.assert_array_equal(
        np.bincount(work.worker, work.pairs, workers), np.bincount(owner, seen.sum(1), workers)
    )
    piece = np.repeat(np.arange(len(spread.worker)), spread.length)
    query, key = np.nonzero(seen)
    needed = {(int(owner[q]), int(piece[k])) for q, k in zip(query, key) if owner[q] != owner[k]}
    moves = spread.moves
    assert sorted(needed) == sorted(zip(moves.receiver.tolist(), moves.block.tolist()))
    step = stages(spread, degree)
    assert ((step >= 0) & (step < degree)).all()
    for receiver in range(workers):
        mine = step[moves.receiver == receiver]
        assert (np.diff(mine[np.argsort(moves.block[moves.receiver == receiver])]) >= 0).all()


def test_stages_bring_equally_much(seed):
    spread = magi_spread(draw_lengths("log-normal", 16 * 32_768, seed), 16)
    step, moves = stages(spread, 4), spread.moves
    each = np.zeros((16, 4))
    np.add.at(each, (moves.receiver, step), spread.length[moves.block])
    # The middle of a piece decides where it goes.
    assert (np.abs(each - each.mean(1, keepdims=True)) <= CHUNK).all()


def test_the_largest_goes_to_whoever_has_least_and_has_room():
    assert deal(np.array([5.0, 9.0, 1.0, 4.0]), 2).tolist() == [1, 0, 0, 1]
    # Worker 1 has less after three, but no room.
    assert deal(np.array([9.0, 4.0, 4.0, 0.0]), 2).tolist() == [0, 1, 1, 0]


def test_it_balances_area_and_pays_for_what_it_sends(seed):
    """Equal area up to a chunk's; more traffic than blocks of FCP that keep a document's neighbours together."""
    lengths = draw_lengths("log-normal", 64 * 32_768, seed)
    magi, fcp = (simulate(lengths, 64, kind, passes="both") for kind in ("magi", "fcp"))
    assert magi.balance > 0.9 and magi.tokens == 1
    assert magi.received > fcp.received
