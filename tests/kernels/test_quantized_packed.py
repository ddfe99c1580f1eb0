"""The Hopper kernel of 4-bit weights times coded rows, interpreted: groups summed as int64 sums them, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, mosaic, tiles
from pallas_kernels.proof import interpret, numerics
from pallas_kernels.quantized_matmul import QuantizedRows, QuantizedWeight, mosaic_packed, quantized_matmul
from pallas_kernels.quantized_matmul.cases import CASES
from pallas_kernels.quantized_matmul.mosaic_kernel import Tiles
from tests.kernels.proof.poison import must_fail

SMALL = {case.name: case for case in CASES if case.small}


def draw(M, N, K, *, grouped, top=128):
    """Rows, codes and power-of-two scales, which leave every float32 sum exact; extremes among the codes."""
    rng = np.random.default_rng([M, N, K])
    rows, codes = rng.integers(-top, top, (M, K)), rng.integers(-8, 8, (N, K))
    rows[0], codes[1] = -top, -8
    own = 2.0 ** rng.integers(-2, 2, (M, K // 128 if grouped else 1))
    return rows, own, codes, 2.0 ** rng.integers(-2, 2, (K // 128, N))


def wanted(rows, own, codes, scale):
    """f64[M, N] by int64 sums of each group."""
    groups = len(scale)
    parts = [v.astype(np.int64).reshape(len(v), groups, 128) for v in (rows, codes)]
    sums = np.einsum("mgk,ngk->gmn", *parts).astype(np.float64)
    return np.einsum("gmn,mg,gn->mn", sums, np.broadcast_to(own, (len(rows), groups)), scale)


def run(rows, own, codes, scale, implementation="mosaic_gpu", config=None):
    biased = (codes + 8).astype(np.uint8)
    w = QuantizedWeight(jnp.asarray(biased[:, ::2] | biased[:, 1::2] << 4), jnp.asarray(scale, jnp.float16))
    x = QuantizedRows(jnp.asarray(rows, jnp.int8), jnp.asarray(own, jnp.float32))
    key = ("quantized_matmul", "4 by 8 bits M32", config or Tiles())
    with compat.interpreted(), tiles.using(*key):
        return np.asarray(
            jax.jit(lambda x, w: quantized_matmul(x, w, implementation=implementation))(x, w), np.float64
        )


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla", "reference"])
@pytest.mark.parametrize(
    ("shape", "grouped", "top", "config"),
    [
        pytest.param((3, 128, 128), False, 128, Tiles(stages=2), id="one group"),
        # Shares of two groups and one, through a ring of one place less than groups.
        pytest.param((5, 256, 384), False, 128, Tiles(2, 2), id="scale a row", marks=pytest.mark.slow),
        pytest.param((5, 128, 384), True, 8, Tiles(2, 1), id="four by four bits", marks=pytest.mark.slow),
    ],
)
def test_every_group_is_summed_exactly(shape, grouped, top, config, implementation):
    given = draw(*shape, grouped=grouped, top=top)
    np.testing.assert_array_equal(run(*given, implementation, config), wanted(*given))


@pytest.mark.slow
def test_every_byte_is_two_codes():
    """One input at a time, all 256 bytes: the value of one code, exactly."""
    low, high = (w.reshape(256, 1) for w in np.meshgrid(np.arange(-8, 8), np.arange(-8, 8)))
    codes = np.tile(np.concatenate([low, high], axis=1), (1, 64))
    rows = np.zeros((4, 128), np.int64)
    rows[np.arange(4), [0, 1, 62, 127]] = [1, 1, -128, 127]
    y = run(rows, np.ones((4, 1)), codes, np.ones((1, 256)))
    np.testing.assert_array_equal(y, rows @ codes.T)


@pytest.mark.slow
def test_second_tiles_of_rows_and_unequal_scales_agree_with_the_reference():
    case = SMALL["small W4A4 M40"]
    with compat.interpreted():
        numerics.compare_case(case, "mosaic_gpu", seed=1, repeat=False).require(case.tolerance)


@pytest.mark.slow
def test_gradients_by_the_scales_are_those_of_the_values():
    case = SMALL["small W4A8 gradients"]
    with compat.interpreted():
        numerics.compare_case(case, "mosaic_gpu", seed=1, repeat=False).require(case.tolerance)


@pytest.mark.slow
def test_a_poisoned_constant_is_noticed(monkeypatch):
    must_fail(monkeypatch, mosaic_packed, "HIGH", 15.0, SMALL["small W4A8 M5"], "mosaic_gpu")


@pytest.mark.slow
@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this version of jax does not see races")
def test_the_kernel_has_no_races():
    case = SMALL["small W4A8 M5"]
    with tiles.using("quantized_matmul", "4 by 8 bits M32", Tiles(stages=2, splits=1)):
        interpret.run(case.call("mosaic_gpu"), jax.jit(case.inputs)(jax.random.key(0)), races=True)


def test_words_hold_what_bytes_do():
    """The constants of the words of registers, which no interpreter runs, are those of the bytes."""

    class Arith:
        """MLIR's operations on 32 bits, in Python's integers."""

        xori, andi = staticmethod(lambda a, b: (a ^ b) % 2**32), staticmethod(lambda a, b: (a & b) % 2**32)
        shli = staticmethod(lambda a, by: (a << by) % 2**32)

    packed = np.random.default_rng(0).integers(0, 256, 64, np.uint8)
    packed[:4] = 0, 255, 136, 119
    words = packed.view(np.uint32).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "on_words", lambda _x, _layout, word: [word(w, int, Arith) for w in words])
        parts = mosaic.upper_nibbles(jnp.asarray(packed.view(np.int8)), None)
    for got, codes in zip(parts, (packed & 15, packed >> 4), strict=True):
        got = np.array(got, np.uint32).view(np.int8)
        np.testing.assert_array_equal(got, 16 * (codes.astype(np.int8) - 8))


def test_places_fill_the_shared_memory_and_no_more():
    for columns in (32, 64, 128):
        for grouped in (False, True):
            stages = mosaic_packed.stages_of(0, columns, grouped)
            held = stages * (128 * 68 + columns * (128 + 4 * grouped)) + 128 * columns * 4
            assert 2 <= stages <= 8 and held <= 227 * 1024
    assert mosaic_packed.stages_of(5, 32, False) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 128), jnp.float8_e5m2)}, "rows of int8 only, not float8_e5m2"),
        ({"offset": jnp.zeros((1, 128))}, "without offsets"),
        ({"scale": jnp.ones((2, 128))}, "groups of 128 inputs .*, not 64, which xla multiplies"),
        ({"codes": jnp.zeros((64, 64), jnp.uint8), "scale": jnp.ones((1, 64))}, "multiples of 128, not 64"),
        ({"x": jnp.zeros((0, 128), jnp.int8)}, "nothing to multiply"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(changes, message):
    given = {
        "x": jnp.zeros((2, 128), jnp.int8),
        "codes": jnp.zeros((128, 64), jnp.uint8),
        "scale": jnp.ones((1, 128)),
        "offset": None,
    } | changes
    rows = QuantizedRows(given["x"], jnp.ones((len(given["x"]), 1)))
    w = QuantizedWeight(given["codes"], given["scale"], given["offset"])
    with compat.interpreted(), pytest.raises(ValueError, match=message):
        quantized_matmul(rows, w, implementation="mosaic_gpu")
