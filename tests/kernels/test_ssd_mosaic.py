"""The Hopper kernels of SSD without a GPU: interpreted, lowered, and the pieces between which they keep states."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import compat
from pallas_kernels.proof import interpret, lowering, numerics
from pallas_kernels.ssd import mosaic_gpu
from pallas_kernels.ssd.cases import CASES, GRADIENTS, case
from pallas_kernels.ssd.pieces import (
    ADDS,
    CHUNK,
    CLOSES,
    LAST,
    OPENS,
    PIECE,
    SEES,
    log_decays,
    one_per_chunk,
    one_per_document,
)
from pallas_kernels.ssd.tiles import Tiles
from tests.kernels.proof.poison import must_fail

SMALL = {c.name: c for c in CASES if c.small}
FORWARD = {name: replace(c, gradients=()) for name, c in SMALL.items()}
KERNELS = ("ssd_states", "ssd_outputs", "ssd_output_gradients", "ssd_input_gradients")
# Half a unit in the last of bfloat16's 8 digits, relative: what one rounding does at most.
UNIT = 2.0**-8
# Four roundings stand in a row at most: a scaled operand, a state, a product of the chunk, the result. They are independent
# of each other and from term to term, so that however long a chunk is they stay in proportion to the sum: UNIT / sqrt(3)
# each on average, 1.2 UNIT together. Relative to the largest value, among some thousands.
TOLERANCE = 2 * UNIT


def inputs_of(states: int | None) -> tuple[str, ...]:
    """What a case with so many initial states is differentiated by."""
    return tuple(name for name in GRADIENTS if states is not None or name != "initial_state")


def test_interpreted_outputs_and_states_agree_with_the_reference_and_repeat():
    with compat.interpreted():
        numerics.compare_case(FORWARD["tiny documents"], "mosaic_gpu").require(TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_gradients_agree_with_the_reference_and_repeat(name):
    with compat.interpreted():
        numerics.compare_case(SMALL[name], "mosaic_gpu").require(TOLERANCE)


def layout(seed: int, T: int, n: int) -> np.ndarray:
    """Random ids i32[1, T] of at most n documents, many shorter than a chunk, some absent, padding anywhere."""
    rng = np.random.default_rng(seed)
    ids, at = np.zeros((1, T), np.int32), 0
    for s in range(1, n + 1):
        at += int(rng.integers(0, 4))
        length = int(rng.choice([0, 1, 5, 40, 64, 90]))
        ids[0, at : at + length] = s
        at += length
    return ids


def recurrence(arrays: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """y [T, P] and the states of all documents of one row of one head, token by token from the definition, in float64."""
    v = {name: np.asarray(a, np.float64)[0] for name, a in arrays.items()}
    ids, states = np.asarray(arrays["segment_ids"])[0], v["initial_state"][:, 0].copy()
    y = np.zeros(v["x"][:, 0].shape)
    for t in np.flatnonzero(ids):
        x, dt, B, C = (v[name][t, 0] for name in ("x", "dt", "B", "C"))
        S = np.exp(dt * v["A"]) * states[ids[t] - 1] + dt * np.outer(x, B)
        states[ids[t] - 1] = S
        y[t] = S @ C + v["D"] * x
    return y, states


@pytest.mark.slow
def test_random_layouts_are_the_recurrence():
    """In float64; every element also within what its own roundings can do, relative to the sum of its terms' magnitudes."""
    T, n = 192, 5
    one = case("one", 1, T, 1, 1, 64, 64, (3,), states=n, options={"chunk_size": 64})
    arrays = one.inputs(jax.random.key(3))
    run = jax.jit(one.call("mosaic_gpu"))
    for seed in range(8):
        arrays["segment_ids"] = jnp.asarray(layout(seed, T, n))
        with compat.interpreted():
            y, states = jax.tree.map(lambda v: np.asarray(v, np.float64), run(arrays))
        wanted_y, wanted = recurrence(arrays)
        sizes = {name: v if name in ("A", "segment_ids") else jnp.abs(v) for name, v in arrays.items()}
        bound_y, bound = recurrence(sizes)
        live = np.asarray(arrays["segment_ids"])[0] > 0
        errors = np.abs(y[0, live, 0] - wanted_y[live]), np.abs(states[0, :, 0] - wanted)
        # A state is summed in float32 of terms rounded once; what 192 sums in float32 add is 2^-16 of it.
        assert (errors[0] <= 4 * UNIT * bound_y[live]).all(), seed
        assert (errors[1] <= (UNIT + 2.0**-16) * bound).all(), seed
        assert errors[0].max() <= TOLERANCE * np.abs(wanted_y).max(), seed
        assert errors[1].max() <= TOLERANCE * np.abs(wanted).max(), seed


@pytest.mark.slow
@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this JAX does not see every race")
@pytest.mark.parametrize("name", SMALL)
def test_there_is_no_race(name):
    chosen = SMALL[name]
    interpret.run(chosen.call("mosaic_gpu"), jax.jit(chosen.inputs)(jax.random.key(1)), races=True)


@pytest.mark.slow
def test_a_wrong_base_of_the_exponential_is_noticed(monkeypatch):
    must_fail(monkeypatch, mosaic_gpu, "LOG2E", 1.3, FORWARD["tiny documents"], "mosaic_gpu")


@pytest.mark.parametrize("states", [None, 1, 5])
def test_forward_and_backward_lower_to_kernels_only(states):
    one = case("lowered", 1, 1000, 4, 2, 64, 128, (600, 300), states=states, gradients=inputs_of(states))
    text = lowering.lower_cuda(one.call("mosaic_gpu"), one.avals())
    for kernel in KERNELS:
        lowering.require_kernel(text, "mosaic_gpu", kernel)
    found = lowering.outside(text)
    # The list of pieces gathers integers: a table of 7 for each of 8 chunks and 5 documents.
    assert (found.dots, found.sorts, found.large_gathers(7 * (8 + 5) + 1)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"operand_dtype": None}, "operands are bfloat16, not float32"),
        ({"chunk_size": 32}, "chunk_size=32 is less than its smallest chunk of 64"),
    ],
)
def test_a_call_that_the_kernel_cannot_run_is_refused(change, reason):
    one = SMALL["tiny open"]
    with compat.interpreted(), pytest.raises(ValueError, match=reason):
        changed = replace(one, options={**one.options, **change})
        jax.eval_shape(changed.call("mosaic_gpu"), one.avals())


def test_other_sizes_and_single_tokens_are_refused():
    for cut, reason in (
        ({"P": 80, "N": 64}, "P = 80 is neither"),
        ({"P": 64, "N": 256}, "N = 256 is neither"),
        ({"P": 64, "N": 64, "T": 1}, "one token is float32"),
    ):
        one = case("one", 1, cut.get("T", 64), 1, 1, cut["P"], cut["N"])
        with compat.interpreted(), pytest.raises(ValueError, match=reason):
            jax.eval_shape(one.call("mosaic_gpu"), one.avals())
    with pytest.raises(ValueError, match="chunk=80: expected 64, 128"):
        Tiles(chunk=80)
    with pytest.raises(ValueError, match="stages=0"):
        Tiles(stages=0)


@partial(jax.jit, static_argnums=(1, 2))
def pieces_of(ids, Q, n):
    pieces = one_per_document(ids, Q, n)
    return pieces, pieces.backwards()


@given(seed=st.integers(0, 2**31))
def test_the_pieces_of_documents_are_their_tokens_in_each_chunk(seed):
    Q, T = 64, 256
    ids = np.maximum.accumulate(layout(seed, T, 6), axis=1)
    pieces, backwards = jax.tree.map(np.asarray, pieces_of(jnp.asarray(ids), Q, 6))
    table = pieces.table[0, : pieces.counts[0]]
    start = 0
    open_now = set()
    for index, piece in enumerate(table):
        end = piece[LAST] + 1
        assert piece[PIECE] == index and start // Q == (end - 1) // Q == piece[CHUNK]
        assert (ids[0, start:end] == piece[SEES]).all() and piece[SEES] == piece[ADDS]
        if piece[OPENS] >= 0:
            assert piece[OPENS] == piece[SEES] - 1 and not (ids[0, :start] == piece[SEES]).any()
            open_now.add(piece[OPENS])
        if piece[CLOSES] >= 0:
            assert not (ids[0, end:] == piece[SEES]).any()
            open_now.remove(piece[CLOSES])
        start = end
    assert start == T and not open_now
    for c, (first, count) in enumerate(pieces.spans[0]):
        assert table[first : first + count, CHUNK].tolist() == [c] * count
    assert pieces.spans[0, :, 1].sum() == len(table)
    turned = table[::-1]
    for column, other in ((PIECE, PIECE), (SEES, ADDS), (OPENS, CLOSES), (CLOSES, OPENS), (LAST, LAST)):
        np.testing.assert_array_equal(backwards[0, : len(table), column], turned[:, other])


def test_one_piece_per_chunk_carries_the_state_of_the_last_document():
    ids = jnp.asarray([[1] * 70 + [2] * 122])
    pieces = one_per_chunk(ids, 64, True)
    assert pieces.table[0].tolist() == [
        [0, 0, 1, 1, 63, 0, -1],
        [1, 1, 1, 2, -1, -1, -1],
        [2, 2, 2, 2, 191, -1, 0],
    ]
    assert one_per_chunk(ids, 64, False).table[0, :, CLOSES].tolist() == [-1] * 3


def test_log_decays_are_sums_within_a_document_and_a_chunk():
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(1, 5, (2, 24)), axis=1)
    a = -rng.exponential(size=(2, 3, 24)).astype(np.float32)
    up_to, after = log_decays(jnp.asarray(a), jnp.asarray(ids), 8)
    for b in range(2):
        for t in range(24):
            mates = [u for u in range(t // 8 * 8, t // 8 * 8 + 8) if ids[b, u] == ids[b, t]]
            np.testing.assert_allclose(up_to[b, :, t], sum(a[b, :, u] for u in mates if u <= t), rtol=1e-6)
            later = sum((a[b, :, u] for u in mates if u > t), np.zeros(3))
            np.testing.assert_allclose(after[b, :, t], later, rtol=1e-6)
