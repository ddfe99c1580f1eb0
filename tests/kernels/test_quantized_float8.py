"""Products with float8 codes, against ml_dtypes' values of every code multiplied in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import QuantizedRows, QuantizedWeight, codes, quantized_matmul
from tests.kernels.kernel_cases import close, normal

KINDS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
quantize_weight = jax.jit(
    codes.quantize_weight, static_argnames=("bits", "group", "clip", "scale_dtype", "code_dtype")
)
quantize_rows = jax.jit(codes.quantize_rows, static_argnames=("group", "clip", "code_dtype"))
product = jax.jit(quantized_matmul, static_argnames=("out_dtype", "implementation"))


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def every_code(kind):
    """[256], and the float64 values that ml_dtypes gives them."""
    found = np.arange(256, dtype=np.uint8).view(kind)
    return found, found.astype(np.float64)


def finite(kind, seed, shape):
    held, values = every_code(kind)
    return np.random.default_rng(seed).choice(held[np.isfinite(values)], shape)


def test_every_code_is_its_value_and_what_is_no_number_stays_in_its_output(kind):
    held, values = every_code(kind)
    w = QuantizedWeight(jnp.asarray(np.repeat(held[:, None], 32, axis=1)), jnp.full((1, 256), 0.5), None, 8)
    ok = np.isfinite(values)
    for x in (np.ones((1, 32)), np.eye(32)[3:4] * 2 + np.eye(32)[4:5] * -1):
        for dtype in (jnp.float32, jnp.bfloat16):
            y = np.asarray(product(jnp.asarray(x, dtype), w, out_dtype=jnp.float32))[0]
            np.testing.assert_array_equal(y[ok], values[ok] * 0.5 * x.sum())
            assert not np.isfinite(y[~ok]).any()


@pytest.mark.parametrize("weights", ["e4m3", "e5m2", "int8", "4 bits"])
def test_every_pair_of_codes_is_multiplied_exactly(kind, weights):
    """One input has a code, the others zero: y[m, n] is the product of row m's code and output n's."""
    rows, values = every_code(kind)
    if weights in KINDS:
        held, wanted = every_code(KINDS[weights])
    else:
        high = 8 if weights == "4 bits" else 128
        held = np.arange(-high, high).astype(np.int8)
        wanted = held.astype(np.float64)
    w = np.zeros((len(held), 32), held.dtype)
    x = np.zeros((256, 32), kind)
    w[:, 5], x[:, 5] = held, rows
    packed = codes.pack_codes(jnp.asarray(w)) if weights == "4 bits" else jnp.asarray(w)
    weight = QuantizedWeight(packed, jnp.full((1, len(held)), 0.25), None, 4 if weights == "4 bits" else 8)
    y = np.asarray(product(QuantizedRows(jnp.asarray(x), jnp.full((256, 1), 2.0)), weight))
    ok = np.isfinite(values)[:, None] & np.isfinite(wanted)[None]
    pairs = np.where(np.isfinite(values), values, 0)[:, None] * np.where(np.isfinite(wanted), wanted, 0)[None]
    np.testing.assert_array_equal(y[ok], 0.5 * pairs[ok])
    assert not np.isfinite(y[~ok]).any()


@pytest.mark.parametrize("offset", [False, True])
def test_products_and_gradients_are_those_of_the_values(kind, offset):
    M, N, K, group = 5, 33, 128, 64
    held, x = finite(kind, 1, (N, K)), normal(2, M, K)
    # As the quantiser would leave them: values about 1.
    scale = np.random.default_rng(3).uniform(0.5, 2, (K // group, N)) / np.abs(held.astype(np.float64)).max()
    scale = jnp.asarray(scale, jnp.float32)
    shift = jnp.asarray(normal(4, K // group, N)) if offset else None

    def wide(v):
        return np.repeat(np.asarray(v, np.float64).T, group, axis=1)

    values = held.astype(np.float64) * wide(scale) + (wide(shift) if offset else 0)
    g = normal(5, M, N)
    dw = g.T.astype(np.float64) @ x.astype(np.float64)

    def of_groups(v):
        return v.reshape(N, -1, group).sum(axis=2).T

    wanted = [x @ values.T, g @ values, of_groups(dw * held.astype(np.float64))]
    wanted += [of_groups(dw)] if offset else []
    for implementation in ("xla", "reference"):

        def call(x, scale, *shift, implementation=implementation):
            w = QuantizedWeight(jnp.asarray(held), scale, shift[0] if shift else None, 8)
            return quantized_matmul(x, w, implementation=implementation)

        @jax.jit
        def both(g, *given, call=call):
            y, pull = jax.vjp(call, *given)
            return y, *pull(g)

        close(list(both(g, x, scale, *([shift] if offset else []))), wanted, 5e-6)


def test_products_of_codes_sum_in_float32_group_by_group(kind):
    M, N, K, group = 7, 24, 192, 64
    rows, held = finite(kind, 6, (M, K)), finite(kind, 7, (N, K))
    rng = np.random.default_rng(8)
    own, scale = (rng.uniform(0.5, 2, shape).astype(np.float32) for shape in ((M, 3), (3, N)))
    shift = rng.normal(size=(3, N)).astype(np.float32)
    w = QuantizedWeight(jnp.asarray(held), jnp.asarray(scale), jnp.asarray(shift), 8)

    def wide(v):
        return np.repeat(np.asarray(v, np.float64), group, axis=1)

    x = rows.astype(np.float64) * wide(own)
    wanted = x @ (held.astype(np.float64) * wide(scale.T) + wide(shift.T)).T

    @jax.jit
    def both(own):
        return jax.vjp(lambda own: quantized_matmul(QuantizedRows(jnp.asarray(rows), own), w), own)[0]

    close(both(jnp.asarray(own)), wanted, 2e-6)


def test_rows_and_weights_are_rounded_to_the_nearest_code(kind):
    """Half a step at most, the largest magnitude to the last code; no value becomes infinite."""
    w = normal(9, 6, 64) * np.float32(10.0) ** np.arange(-2, 4)[:, None]
    top = float(ml_dtypes.finfo(kind).max)
    found = quantize_weight(jnp.asarray(w), bits=8, group=32, scale_dtype=jnp.float32, code_dtype=kind)
    rows = quantize_rows(jnp.asarray(w), group=32, code_dtype=kind)
    parts = w.reshape(6, 2, 32)
    scale = np.abs(parts).max(axis=2) / np.float32(top)
    np.testing.assert_allclose(found.scale.T, scale, rtol=1e-6)
    np.testing.assert_allclose(rows.scale, scale, rtol=1e-6)
    for held, step in ((found.codes, found.scale.T), (rows.codes, rows.scale)):
        assert held.dtype == kind
        steps = parts.astype(np.float64) / np.asarray(step, np.float64)[..., None]
        # The nearest of all codes, looked for one by one.
        values = every_code(kind)[1]
        values = values[np.isfinite(values)]
        least = np.abs(steps[..., None] - values).min(axis=-1)
        error = np.abs(np.asarray(held).astype(np.float64).reshape(steps.shape) - steps)
        np.testing.assert_allclose(error, least, atol=1e-6 * top)
        assert np.abs(np.asarray(held).astype(np.float64)).max() == top


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bits": 4, "code_dtype": jnp.float8_e4m3fn},
            "code_dtype='float8_e4m3fn': expected int8 with 4 bits",
        ),
        ({"bits": 8, "code_dtype": jnp.float8_e4m3fnuz}, "code_dtype='float8_e4m3fnuz': expected one of"),
    ],
)
def test_other_codes_are_refused(own_checks, changes, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(jnp.zeros((2, 64)), group=32, **changes)


def test_clipped_ranges_end_at_the_last_code(kind):
    """What lies beyond is no infinity and no NaN, which is what a cast would make of it."""
    x = jnp.asarray(normal(10, 4, 64))
    top = float(ml_dtypes.finfo(kind).max)
    for held in (
        quantize_rows(x, code_dtype=kind, clip=0.5).codes,
        quantize_weight(x, bits=8, group=64, clip=0.5, scale_dtype=jnp.float32, code_dtype=kind).codes,
    ):
        assert np.abs(np.asarray(held).astype(np.float64)).max() == top
