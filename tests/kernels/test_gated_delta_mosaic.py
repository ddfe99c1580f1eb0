"""The Hopper kernels of the gated delta rule without a GPU: interpreted, lowered, and what they refuse."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compat
from pallas_kernels.gated_delta import mosaic_cotangents, mosaic_gpu
from pallas_kernels.gated_delta.cases import ALL, CASES, TOKENWISE, case
from pallas_kernels.gated_delta.tiles import Tiles
from pallas_kernels.proof import interpret, lowering, numerics
from tests.kernels.proof.poison import must_fail
from tests.kernels.test_ssd_mosaic import layout

SMALL = {c.name: c for c in CASES if c.small}
KERNELS = ("gated_delta_states", "gated_delta_outputs")
BACKWARD = (
    "gated_delta_cotangents",
    "gated_delta_query_gradients",
    "gated_delta_read_gradients",
    "gated_delta_key_gradients",
)
TOLERANCE = 8e-3


def test_interpreted_outputs_and_states_agree_with_the_reference_and_repeat():
    with compat.interpreted():
        numerics.compare_case(SMALL["tiny documents"], "mosaic_gpu").require(TOLERANCE)


@pytest.mark.slow
def test_a_row_with_open_ends_and_wide_values_agrees_with_the_reference():
    with compat.interpreted():
        numerics.compare_case(SMALL["tiny open"], "mosaic_gpu").require(TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize(("dk", "dv", "documents"), [(256, 64, None), (64, 192, (3, 1, 90, 30))])
def test_other_widths_agree_with_the_reference(dk, dv, documents):
    with compat.interpreted():
        one = case("one", 1, 130, 1, 1, dk, dv, documents)
        numerics.compare_case(one, "mosaic_gpu", repeat=False).require(TOLERANCE)


@pytest.mark.slow
def test_random_layouts_agree_with_the_reference():
    T, n = 192, 5
    one = case("one", 1, T, 1, 1, 64, 64, (3,), states=n)
    arrays = one.inputs(jax.random.key(3))
    run = jax.jit(one.call("mosaic_gpu"))
    right = jax.jit(replace(one, options={}).call("reference"))
    for seed in range(8):
        arrays["segment_ids"] = jnp.asarray(layout(seed, T, n))
        exact = jax.tree.map(lambda v: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v, arrays)
        wanted = right(exact)
        with compat.interpreted():
            got = run(arrays)
        dead = (arrays["segment_ids"] == 0)[..., None, None]
        assert numerics.error(got[0], wanted[0], dead) < TOLERANCE, seed
        assert numerics.error(got[1], wanted[1]) < TOLERANCE, seed


@pytest.mark.slow
def test_interpreted_gradients_agree_with_the_recurrence_and_repeat():
    """For random cotangents of o and the final states; NaN on padding reaches none of them."""
    with compat.interpreted():
        numerics.compare_case(SMALL["tiny documents backward"], "mosaic_gpu").require(TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("dk", "dv", "documents", "states", "open_ends"),
    [
        (96, 128, (60, 57), 1, True),
        (64, 192, (3, 1, 90, 30), None, False),
        (256, 64, None, None, False),
        (128, 256, None, 1, False),
    ],
)
def test_gradients_of_other_widths_agree_with_the_recurrence(dk, dv, documents, states, open_ends):
    names = TOKENWISE if states is None else ALL
    options = {"open_ends": open_ends}
    one = case("one", 1, 130, 1, 1, dk, dv, documents, states=states, gradients=names, options=options)
    # Of wide keys more products of bfloat16 states and cotangents are summed: XLA, which rounds fewer, is at 0.7e-2.
    tolerance = TOLERANCE * (1.5 if dk >= 128 else 1)
    with compat.interpreted():
        numerics.compare_case(one, "mosaic_gpu", repeat=False).require(tolerance)


@pytest.mark.nightly
@pytest.mark.parametrize(("row", "other"), [("SINCE", 2), ("UNTIL", 1), ("READS", 1)])
def test_another_factor_of_a_cotangent_is_noticed(monkeypatch, row, other):
    must_fail(monkeypatch, mosaic_cotangents, row, other, SMALL["tiny documents backward"], "mosaic_gpu")


@pytest.mark.slow
@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this JAX does not see every race")
@pytest.mark.parametrize("name", SMALL)
def test_there_is_no_race(name):
    chosen = SMALL[name]
    interpret.run(chosen.call("mosaic_gpu"), jax.jit(chosen.inputs)(jax.random.key(1)), races=True)


@pytest.mark.nightly
def test_a_wrong_base_of_the_exponential_is_noticed(monkeypatch):
    must_fail(monkeypatch, mosaic_gpu, "LOG2E", 1.3, SMALL["tiny documents"], "mosaic_gpu")


@pytest.mark.parametrize("states", [pytest.param(None, marks=pytest.mark.slow), 5])
def test_forward_lowers_to_kernels_and_what_is_listed(states):
    one = case("lowered", 1, 1000, 2, 4, 96, 256, (600, 300), states=states)
    text = lowering.lower_cuda(one.call("mosaic_gpu"), one.avals())
    for kernel in KERNELS:
        lowering.require_kernel(text, "mosaic_gpu", kernel)
    found = lowering.outside(text)
    # Overlaps of keys, and two products at each of three doublings of the inverted blocks.
    assert (found.dots, found.sorts) == (7, 0)
    # The list of pieces gathers integers: a table of 7 for each of 16 chunks and 5 documents.
    assert found.large_gathers(7 * (16 + 5) + 1) == 0


@pytest.mark.slow
def test_backward_lowers_to_kernels_and_what_is_listed():
    one = case("lowered", 1, 1000, 2, 4, 96, 256, (600, 300), states=5, gradients=ALL)
    text = lowering.lower_cuda(one.call("mosaic_gpu"), one.avals())
    for kernel in (*KERNELS, *BACKWARD):
        lowering.require_kernel(text, "mosaic_gpu", kernel)
    found = lowering.outside(text)
    # Those of forward once more, then the cotangents of the triangles and the two sides of the overlaps of keys.
    assert (found.dots, found.sorts) == (7 + 7 + 3, 0)
    assert found.large_gathers(7 * (16 + 5) + 1) == 0


@pytest.mark.parametrize(
    ("sizes", "change", "reason"),
    [
        ((64, 64, 64), {"operand_dtype": None}, "operands are bfloat16, not float32"),
        ((64, 64, 64), {"chunk_size": 32}, "chunk_size=32 is less than its chunk of 64"),
        ((64, 80, 64), {}, "dk = 80 is no multiple of 32"),
        ((64, 288, 64), {}, "dk = 288 is no multiple of 32 from 64 to 256"),
        ((64, 64, 96), {}, "dv = 96 is no multiple of 64"),
        ((1, 64, 64), {}, "one token is float32"),
    ],
)
def test_a_call_that_the_kernel_cannot_run_is_refused(sizes, change, reason):
    T, dk, dv = sizes
    one = case("one", 1, T, 1, 1, dk, dv, options=change)
    with compat.interpreted(), pytest.raises(ValueError, match=reason):
        jax.eval_shape(one.call("mosaic_gpu"), one.avals())


def test_tiles_without_a_stage_are_refused():
    with pytest.raises(ValueError, match="stages=0"):
        Tiles(stages=0)
    assert Tiles() in list(Tiles().candidates())
