"""The Hopper kernels of many adapters: interpreted, lowered for CUDA, refused where they cannot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.proof import interpret, lowering, numerics
from pallas_kernels.segmented_matmul import segmented_matmul
from pallas_kernels.segmented_matmul.cases import CASES

SMALL = {case.name: case for case in CASES if case.small}
BORDERS, DECODE = SMALL["small borders rank 8"], SMALL["small decode rank 64"]


@pytest.mark.slow
def test_products_and_gradients_across_borders_agree_with_the_reference():
    """Poisoned with NaN: rows of no adapter, slot 0, slots without rows."""
    with compat.interpreted():
        numerics.compare_case(BORDERS, "mosaic_gpu", seed=1, repeat=False).require(BORDERS.tolerance)


@pytest.mark.nightly
def test_a_decode_repeats_bit_for_bit():
    with compat.interpreted():
        numerics.compare_case(DECODE, "mosaic_gpu", seed=1, repeat=True).require(DECODE.tolerance)


@pytest.mark.slow
def test_what_stands_between_the_products_has_more_bits_than_bfloat16():
    """y is exactly 2**-10 where the low-rank row is 1 + 2**-10, and zero were that rounded to bfloat16."""
    x = jnp.zeros((5, 128), jnp.bfloat16).at[:, 0].set(1).at[:, 1].set(2.0**-10)
    a = jnp.zeros((9, 128, 64), jnp.bfloat16).at[:, :2, 0].set(1).at[:, 0, 1].set(-1)
    b = jnp.zeros((9, 64, 64), jnp.bfloat16).at[:, :2].set(1)
    slots = jnp.array([7, 0, 2, 9, -1])
    with compat.interpreted():
        y = jax.jit(lambda *given: segmented_matmul(*given, implementation="mosaic_gpu"))(
            x, a, b, jnp.full(9, 3.0), slots
        )
    wanted = np.array([3 * 2.0**-10, 0, 3 * 2.0**-10, np.nan, np.nan], np.float32)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.broadcast_to(wanted[:, None], y.shape))


@pytest.mark.nightly
@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this version of jax does not see races")
def test_the_kernels_have_no_races():
    interpret.run(BORDERS.call("mosaic_gpu"), jax.jit(BORDERS.inputs)(jax.random.key(0)), races=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_lower_and_xla_multiplies_nothing(case):
    text = lowering.lower_cuda(case.call("mosaic_gpu"), case.avals())
    for kernel in ("segmented_matmul_rows", *(["grouped_matmul_weights"] if case.gradients else [])):
        lowering.require_kernel(text, "mosaic_gpu", kernel)
    assert lowering.outside(text).dots == 0


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"x": jnp.zeros((4, 64))}, {}, "x must be bfloat16, not float32"),
        ({}, {"operand_dtype": jnp.float32}, "operands must be bfloat16, not float32"),
        ({"b": jnp.zeros((2, 8, 64), jnp.float16)}, {}, "b must be bfloat16 or float32, not float16"),
        ({"b": jnp.zeros((2, 8, 96), jnp.bfloat16)}, {}, "in multiples of 64, not 64 and 96"),
        (
            {"a": jnp.zeros((2, 64, 129), jnp.bfloat16), "b": jnp.zeros((2, 129, 64), jnp.bfloat16)},
            {},
            "ranks to 128, not 129",
        ),
        ({"x": jnp.zeros((0, 64), jnp.bfloat16), "slots": jnp.zeros(0, int)}, {}, "nothing to multiply"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(changes, options, message):
    given = {
        "x": jnp.zeros((4, 64), jnp.bfloat16),
        "a": jnp.zeros((2, 64, 8), jnp.bfloat16),
        "b": jnp.zeros((2, 8, 64), jnp.bfloat16),
        "scaling": jnp.ones(2),
        "slots": jnp.array([1, 0, 1, 1]),
    }
    with compat.interpreted(), pytest.raises(ValueError, match=message):
        segmented_matmul(**{**given, **changes}, **options, implementation="mosaic_gpu")
