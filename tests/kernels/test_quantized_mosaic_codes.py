"""The Hopper kernel of codes times codes, interpreted: integers against int64 bit for bit, float8 against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, tiles
from pallas_kernels.proof import interpret, numerics
from pallas_kernels.quantized_matmul import QuantizedRows, QuantizedWeight, mosaic_codes, quantized_matmul
from pallas_kernels.quantized_matmul.cases import CASES
from pallas_kernels.quantized_matmul.mosaic_kernel import Tiles
from tests.kernels.kernel_cases import close

SMALL = {case.name: case for case in CASES if case.small}


def draw(M, N, K, groups=1):
    """Codes of the whole range, a row of extremes among them, and scales."""
    rng = np.random.default_rng([M, N, K, groups])
    rows, codes = (rng.integers(-128, 128, (n, K)).astype(np.int8) for n in (M, N))
    rows[0] = codes[1] = -128
    own, scale = (rng.uniform(0.5, 2, shape).astype(np.float32) for shape in ((M, groups), (groups, N)))
    return rows, own, codes, scale


def run(rows, own, codes, scale, **config):
    key = f"int8 codes {'few' if len(rows) <= mosaic_codes.LEFT else 'many'}"
    x, w = (
        QuantizedRows(jnp.asarray(rows), jnp.asarray(own)),
        QuantizedWeight(jnp.asarray(codes), jnp.asarray(scale), None, 8),
    )
    with compat.interpreted(), tiles.using("quantized_matmul", key, Tiles(**config)):
        return np.asarray(jax.jit(lambda x, w: quantized_matmul(x, w, implementation="mosaic_gpu"))(x, w))


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        # Second tiles of rows and of columns, neither full, and more steps than places.
        ((137, 192, 192), {"stages": 2}),
        # Turned, in shares of two steps and one that XLA adds and scales.
        pytest.param((5, 192, 192), {"splits": 2}, marks=pytest.mark.slow),
    ],
    ids=["many rows", "few rows"],
)
def test_one_scale_a_row_is_exact_to_the_bit(shape, config):
    rows, own, codes, scale = draw(*shape)
    sums = rows.astype(np.int64) @ codes.astype(np.int64).T
    np.testing.assert_array_equal(
        run(rows, own, codes, scale, **config), sums.astype(np.float32) * (own * scale)
    )


@pytest.mark.slow
def test_wide_tiles_leave_in_two_halves():
    """The tiles of prefill, which no small call gets."""
    rows, own, codes, scale = draw(130, 320, 64)
    with compat.interpreted():
        y = jax.jit(
            lambda *arrays: mosaic_codes.launch(
                *arrays, columns=256, splits=1, stages=2, out_dtype=jnp.float32
            )
        )(*map(jnp.asarray, (rows, codes, own.T, scale)))
    sums = rows.astype(np.int64) @ codes.astype(np.int64).T
    np.testing.assert_array_equal(y[0, :130, :320], sums.astype(np.float32) * (own * scale))


@pytest.mark.slow
@pytest.mark.parametrize("own_groups", [False, True], ids=["scale a row", "scale a group"])
def test_groups_are_scaled_each_by_its_own(own_groups):
    rows, own, codes, scale = draw(5, 192, 192, 3)
    own = own if own_groups else own[:, :1]
    parts = [v.astype(np.int64).reshape(len(v), 3, 64) for v in (rows, codes)]
    sums = np.einsum("mgk,ngk->gmn", *parts).astype(np.float64)
    wide = np.broadcast_to(own.T, (3, 5)).astype(np.float64)
    close(run(rows, own, codes, scale, splits=2), np.einsum("gmn,gm,gn->mn", sums, wide, scale), 1e-6)


@pytest.mark.slow
def test_nothing_past_the_last_row_matters(monkeypatch):
    """What the copy engine reads there is garbage here, and no number."""
    rows, own, codes, scale = draw(137, 192, 64)

    def garbage(v, axis, block):
        fill = [(0, 0)] * v.ndim
        fill[axis] = (0, -v.shape[axis] % block)
        return jnp.pad(v, fill, constant_values=jnp.asarray(77 if v.dtype == jnp.int8 else jnp.nan, v.dtype))

    monkeypatch.setattr(mosaic_codes, "rows_of", garbage)
    sums = rows.astype(np.int64) @ codes.astype(np.int64).T
    np.testing.assert_array_equal(run(rows, own, codes, scale), sums.astype(np.float32) * (own * scale))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small e4m3 M5 group64", "small e5m2 M137"])
def test_float8_agrees_with_its_values_in_float64(name):
    """And a code that is no number stays in its row."""
    case = SMALL[name]
    arrays = dict(jax.jit(case.inputs)(jax.random.key(1)))
    arrays["x"] = arrays["x"].at[3, 70].set(127)
    kind, group = jnp.dtype(case.options["kind"]), 192 // arrays["scale"].shape[0]
    with compat.interpreted():
        y = np.asarray(jax.jit(case.call("mosaic_gpu"))(arrays))

    def values(codes, scale):
        held = np.asarray(codes).view(kind).astype(np.float64)
        return held * np.repeat(np.asarray(scale, np.float64), group, axis=1)

    wanted = values(arrays["x"], arrays["x_scale"]) @ values(arrays["codes"], arrays["scale"].T).T
    assert np.isnan(y[3]).all()
    others = np.arange(len(y)) != 3
    close(y[others], wanted[others], 2e-6)


@pytest.mark.slow
def test_gradients_by_the_scales_are_those_of_the_values():
    case = SMALL["small int8 gradients"]
    with compat.interpreted():
        numerics.compare_case(case, "mosaic_gpu", seed=1, repeat=False).require(case.tolerance)


@pytest.mark.slow
@pytest.mark.skipif(not compat.RACES_ARE_SEEN, reason="this version of jax does not see races")
@pytest.mark.parametrize("name", ["small int8 M137", "small int8 M5 group64"])
def test_the_kernel_has_no_races(name):
    key = f"int8 codes {'many' if '137' in name else 'few'}"
    with tiles.using("quantized_matmul", key, Tiles(stages=2)):
        interpret.run(
            SMALL[name].call("mosaic_gpu"), jax.jit(SMALL[name].inputs)(jax.random.key(0)), races=True
        )


def test_places_fill_the_shared_memory_and_no_more():
    for columns in (32, 64, 128, 256):
        for depth in (32, 64, 128):
            for itemsize in (2, 4):
                out = min(columns, 128) * itemsize
                stages = mosaic_codes.stages_of(0, depth, columns, out)
                held = stages * (128 + columns) * (depth + 4) + 128 * out + 4 * (128 + columns)
                assert 2 <= stages <= 8 and held <= 227 * 1024
    assert mosaic_codes.stages_of(5, 128, 32, 128) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 32), jnp.float8_e5m2)}, "of one dtype, not float8_e5m2 and int8"),
        ({"offset": jnp.zeros((1, 64))}, "without offsets"),
        (
            {"codes": jnp.zeros((32, 32), jnp.int8), "scale": jnp.ones((1, 32))},
            "outputs of 64, .*not 32 and 32",
        ),
        (
            {"x": jnp.zeros((2, 48), jnp.int8), "codes": jnp.zeros((64, 48), jnp.int8)},
            "multiples of 32 and outputs of 64, .*not 48 and 64",
        ),
        ({"x": jnp.zeros((0, 32), jnp.int8)}, "nothing to multiply"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_with_the_reason(changes, message):
    given = {
        "x": jnp.zeros((2, 32), jnp.int8),
        "codes": jnp.zeros((64, 32), jnp.int8),
        "scale": jnp.ones((1, 64)),
        "offset": None,
    } | changes
    rows = QuantizedRows(given["x"], jnp.ones((len(given["x"]), 1)))
    w = QuantizedWeight(given["codes"], given["scale"], given["offset"], 8)
    with compat.interpreted(), pytest.raises(ValueError, match=message):
        quantized_matmul(rows, w, implementation="mosaic_gpu")
