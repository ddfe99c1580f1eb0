"""The Hopper kernel of quantised products: interpreted, lowered for CUDA, broken on purpose, refused where it cannot run."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import compat, tiles
from pallas_kernels.proof import interpret, lowering, numerics
from pallas_kernels.quantized_matmul import (
    QuantizedWeight,
    mosaic_gpu,
    mosaic_kernel,
    quantized_matmul,
)
from pallas_kernels.quantized_matmul.cases import CASES
from pallas_kernels.quantized_matmul.mosaic_kernel import Tiles
from tests.kernels.proof.poison import must_fail

SMALL = {case.name: case for case in CASES if case.small}
# Five groups in shares of three and two, through a ring of two.
UNEVEN = SMALL["small M40 group64 offset"]
RING = ("quantized_matmul", "4 bits group64 M64", Tiles(stages=2, splits=2))

# Three steps through a ring of two.
NVFP4 = SMALL["small nvfp4 M40"]
NVFP4_RING = ("quantized_matmul", "nvfp4 group64 M64", Tiles(stages=2, splits=1))


@pytest.mark.parametrize(
    ("case", "ring"), [(UNEVEN, RING), pytest.param(NVFP4, NVFP4_RING, marks=pytest.mark.slow)]
)
def test_uneven_shares_through_a_short_ring_agree_with_the_reference(case, ring):
    with compat.interpreted(), tiles.using(*ring):
        numerics.compare_case(case, "mosaic_gpu", seed=1).require(case.tolerance)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.nightly if number > 1 else pytest.mark.slow)
        for number, case in enumerate(SMALL.values())
        if "x_scale" not in case.avals()
    ],
    ids=lambda case: case.name,
)
def test_the_interpreted_kernel_agrees_with_the_reference(case):
    with compat.interpreted():
        numerics.compare_case(case, "mosaic_gpu", seed=1, repeat=False).require(case.tolerance)


@pytest.mark.slow
def test_every_code_at_either_place_of_a_byte():
    """One input at a time, a byte of each output: the value of one code, exactly."""
    low, high = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    packed = np.tile((low + 16 * high).reshape(256, 1).astype(np.uint8), (1, 32))
    w = QuantizedWeight(jnp.asarray(packed), jnp.full((1, 256), 0.5, jnp.float16))
    with compat.interpreted():
        y = quantized_matmul(
            jnp.eye(64, dtype=jnp.bfloat16), w, out_dtype=jnp.float32, implementation="mosaic_gpu"
        )
    for place, nibble in ((0, low), (1, high)):
        wanted = (nibble.reshape(-1) - 8) * 0.5
        np.testing.assert_array_equal(y[place::2], np.tile(wanted, (32, 1)))


@pytest.mark.slow
def test_every_code_times_every_scale_of_nvfp4():
    """One input at a time: 16 codes at both places times 254 scales, exactly; two scales are no numbers."""
    nibbles = np.tile(np.concatenate([np.arange(16), np.arange(16)[::-1]] * 2).astype(np.uint8), (256, 1))
    scale = jnp.tile(
        jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), jnp.float8_e4m3fn), (4, 1)
    )
    packed = jnp.asarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4))
    w = QuantizedWeight(packed, scale, tensor_scale=jnp.float32(0.5))
    with compat.interpreted():
        y = quantized_matmul(
            jnp.eye(64, dtype=jnp.bfloat16), w, out_dtype=jnp.float32, implementation="mosaic_gpu"
        )
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    finite = np.isfinite(values)
    wanted = codes[nibbles].T * np.where(finite, values, 0) * 0.5
    np.testing.assert_array_equal(np.asarray(y)[:, finite], wanted[:, finite])
    assert finite.sum() == 254 and np.isnan(np.asarray(y)[:, ~finite]).all()


@pytest.mark.slow
def test_what_is_no_number_in_nvfp4_stays_where_it_belongs():
    arrays = dict(jax.jit(NVFP4.inputs)(jax.random.key(0)))
    call = NVFP4.call("mosaic_gpu")
    with compat.interpreted():
        clean = np.asarray(call(arrays))
        arrays["x"] = arrays["x"].at[39].set(jnp.nan)
        arrays["scale"] = arrays["scale"].at[7, 100].set(127)
        y = np.asarray(call(arrays))
    assert np.isnan(y[39]).all() and np.isnan(y[:, 100]).all()
    columns = np.delete(np.arange(128), 100)
    np.testing.assert_array_equal(y[:39, columns], clean[:39, columns])


@pytest.mark.slow
def test_what_is_not_a_number_stays_where_it_belongs():
    """Neither a row of x nor an output's scale reaches others, padding included."""
    arrays = dict(jax.jit(UNEVEN.inputs)(jax.random.key(0)))
    call = UNEVEN.call("mosaic_gpu")
    with compat.interpreted():
        clean = np.asarray(call(arrays))
        arrays["x"] = arrays["x"].at[39].set(jnp.nan)
        arrays["scale"] = arrays["scale"].at[4, 130].set(jnp.nan)
        y = np.asarray(call(arrays))
    assert np.isnan(y[39]).all() and np.isnan(y[:, 130]).all()
    columns = np.delete(np.arange(256), 130)
    np.testing.assert_array_equal(y[:39, columns], clean[:39, columns])


@pytest.mark.parametrize(
    ("module", "constant", "value"),
    [
        pytest.param(mosaic_kernel, "BIAS", 7, marks=pytest.mark.slow),
        pytest.param(mosaic_kernel, "_LOW", 7, marks=pytest.mark.nightly),
        pytest.param(mosaic_gpu, "HIGH", 15.0, marks=pytest.mark.nightly),
    ],
)
def test_a_poisoned_constant_is_noticed(monkeypatch, module, constant, value):
    must_fail(monkeypatch, module, constant, value, SMALL["small M5"], "mosaic_gpu")


@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this version of jax does not see races")
@pytest.mark.parametrize(
    ("case", "ring"), [(UNEVEN, RING), pytest.param(NVFP4, NVFP4_RING, marks=pytest.mark.slow)]
)
def test_the_kernel_has_no_races(case, ring):
    with tiles.using(*ring):
        interpret.run(case.call("mosaic_gpu"), jax.jit(case.inputs)(jax.random.key(0)), races=True)


def often(case):
    """Not with the slow tests: the tiles of coded rows are the same at every preset's shape."""
    shown = ("int8 8B up M", "W4A8 8B up M4096", "W4A4 8B up M16")
    return case.small or "x_scale" not in case.avals() or any(name in case.name for name in shown)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if often(case) else pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
def test_the_kernel_lowers_and_xla_multiplies_nothing_but_gradients(case):
    text = lowering.lower_cuda(case.call("mosaic_gpu"), case.avals())
    lowering.require_kernel(text, "mosaic_gpu", "quantized_matmul")
    found = lowering.outside(text)
    # The gradients of scales of groups want the sums once more, those of weights in 4 bits two products, of NVFP4 one.
    one = {"x_scale", "tensor_scale"} & set(case.avals())
    gradients = (1 if one else 2) if case.gradients else 0
    assert (found.dots, found.sorts, found.gathers) == (gradients, 0, ())


def test_shares_of_the_inputs_are_never_empty():
    for programs in (1, 7, 32, 168, 500):
        for groups in range(1, 40):
            found = mosaic_gpu.splits_of(0, programs, groups)
            share = -(-groups // found)
            assert 1 <= found <= groups and (found - 1) * share < groups
    assert mosaic_gpu.splits_of(0, 32, 32) == 8 and mosaic_gpu.splits_of(4, 500, 32) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 128))}, "x must be bfloat16, not float32"),
        ({"operand_dtype": jnp.float32}, "operands must be bfloat16, not float32"),
        (
            {"codes": jnp.zeros((128, 128), jnp.int8), "bits": 8},
            "weights in 8 bits have a kernel with rows in 8 bits only",
        ),
        ({"scale": jnp.zeros((4, 128))}, "groups of 64 or 128 inputs, not 32"),
        (
            {"codes": jnp.zeros((64, 64), jnp.uint8), "scale": jnp.zeros((1, 64))},
            "outputs in multiples of 128, not 64",
        ),
        ({"x": jnp.zeros((0, 128), jnp.bfloat16)}, "nothing to multiply"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(changes, message):
    given = {
        "x": jnp.zeros((2, 128), jnp.bfloat16),
        "codes": jnp.zeros((128, 64), jnp.uint8),
        "scale": jnp.zeros((1, 128)),
        "bits": 4,
        "operand_dtype": None,
    } | changes
    w = QuantizedWeight(given["codes"], given["scale"], None, given["bits"])
    with compat.interpreted(), pytest.raises(ValueError, match=message):
        quantized_matmul(given["x"], w, operand_dtype=given["operand_dtype"], implementation="mosaic_gpu")


def test_inputs_of_nvfp4_that_fill_no_step_are_refused_with_the_reason():
    w = QuantizedWeight(
        jnp.zeros((128, 16), jnp.uint8), jnp.zeros((2, 128), jnp.float8_e4m3fn), tensor_scale=jnp.float32(1)
    )
    with compat.interpreted(), pytest.raises(ValueError, match="inputs of NVFP4 in multiples of 64, not 32"):
        quantized_matmul(jnp.zeros((2, 32), jnp.bfloat16), w, implementation="mosaic_gpu")


def test_other_devices_are_refused_with_the_reason():
    w = QuantizedWeight(jnp.zeros((128, 64), jnp.uint8), jnp.zeros((1, 128)))
    with pytest.raises(ValueError, match="needs a Hopper GPU, not cpu"):
        quantized_matmul(jnp.zeros((2, 128), jnp.bfloat16), w, implementation="mosaic_gpu")
