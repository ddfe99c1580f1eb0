"""NVFP4 weights against ml_dtypes' e2m1 and e4m3: every code times every scale, and products of values in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import (
    QuantizedRows,
    QuantizedWeight,
    dequantize_weight,
    nvfp4,
    quantized_matmul,
    xla,
)
from pallas_kernels.quantized_matmul.codes import signed_codes
from tests.kernels.kernel_cases import close, normal

quantize = jax.jit(nvfp4.quantize_nvfp4)
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
SCALES = E4M3.astype(np.float64)


def packed(codes):
    """u8[N, K / 2], byte by byte."""
    found = np.zeros((codes.shape[0], codes.shape[1] // 2), np.uint8)
    for k in range(codes.shape[1]):
        found[:, k // 2] |= (codes[:, k] << (4 * (k % 2))).astype(np.uint8)
    return jnp.asarray(found)


def draw(seed, M, N, K):
    """x, random codes with random finite scales, and their values in float64."""
    rng = np.random.default_rng([seed, M, N, K])
    codes = rng.integers(0, 16, (N, K)).astype(np.uint8)
    scale = rng.choice(E4M3[np.isfinite(SCALES)], (K // 16, N))
    total = np.float32(rng.uniform(1e-3, 2e-3))
    w = QuantizedWeight(packed(codes), jnp.asarray(scale), tensor_scale=jnp.asarray(total))
    values = E2M1[codes] * np.repeat(scale.astype(np.float64).T, 16, axis=1)
    return rng.normal(size=(M, K)).astype(np.float32), w, values * np.float64(total)


@pytest.fixture(params=["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def blocks(request, monkeypatch):
    """Blocks of 16 outputs of which the last overlaps the one before; or one block, as small weights always are."""
    if request.param == "blocks":
        monkeypatch.setattr(xla, "_BLOCK_BYTES", 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_code_times_every_scale_at_either_place_of_a_byte(dtype):
    """One input at a time: each result is one value, exactly; those of a scale that is no number are none."""
    codes = np.tile(np.concatenate([np.arange(16), np.arange(16)[::-1]]).astype(np.uint8), (256, 1))
    scale = np.stack([E4M3, E4M3[::-1]])
    w = QuantizedWeight(packed(codes), jnp.asarray(scale), tensor_scale=jnp.float32(0.5))
    run = jax.jit(quantized_matmul, static_argnames="out_dtype")
    # A row at a time against zeros: where a scale is NaN, so is all of its output.
    y = np.asarray(run(jnp.eye(32, dtype=dtype), w, out_dtype=jnp.float32))
    finite = np.isfinite(scale.astype(np.float64)).all(axis=0)
    wanted = E2M1[codes] * np.repeat(scale.astype(np.float64).T, 16, axis=1) * 0.5
    np.testing.assert_array_equal(y[:, finite], wanted[finite].T)
    assert finite.sum() == 252 and np.isnan(y[:, ~finite]).all()
    np.testing.assert_array_equal(np.asarray(dequantize_weight(w))[finite], wanted[finite])


def test_codes_are_the_casts_of_ml_dtypes():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    around = [ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(9))]
    values = np.concatenate([*around, np.array([0, 6, 7, 1e30], np.float32), normal(0, 4096) * 3])
    values = np.concatenate([values, -values]).astype(np.float32)
    wanted = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    np.testing.assert_array_equal(jax.jit(nvfp4.e2m1_codes)(values), wanted)


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_weights_get_the_papers_scales_and_the_nearest_codes(magnitude):
    w = (normal(1, 48, 64) * magnitude).astype(np.float32)
    w[3, 16:32] = 0
    w[4, :16] *= 1e-7
    found = quantize(w)
    encode = np.float32(2688) / np.abs(w).max()
    largest = np.abs(w.reshape(48, 4, 16)).max(axis=2)
    steps = np.clip(largest * (encode * np.float32(1 / 6)), 2.0**-9, 448)
    wanted = steps.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(found.scale).view(np.uint8), wanted.T.view(np.uint8))
    np.testing.assert_allclose(found.tensor_scale, 1 / encode, rtol=1e-7)
    # The nearest of all codes, looked for one by one.
    step = wanted.astype(np.float64)[..., None] * np.float64(found.tensor_scale)
    exact = w.astype(np.float64).reshape(48, 4, 16) / step
    least = np.abs(exact[..., None] - E2M1).min(axis=-1)
    error = np.abs(np.asarray(dequantize_weight(found), np.float64).reshape(48, 4, 16) / step - exact)
    np.testing.assert_allclose(error, least, atol=1e-5)


def test_what_was_rounded_once_stays_and_powers_of_two_change_the_tensors_scale_only():
    w = normal(2, 48, 64).astype(np.float32)
    found = quantize(w)
    again, grown = quantize(dequantize_weight(found)), quantize(w * 8)
    for other, factor in ((again, 1), (grown, 8)):
        # Not as bytes: a value of -0 comes back as 0.
        np.testing.assert_array_equal(signed_codes(other), signed_codes(found))
        np.testing.assert_array_equal(np.asarray(other.scale), np.asarray(found.scale))
        np.testing.assert_allclose(other.tensor_scale, found.tensor_scale * factor, rtol=1e-6)


def test_normal_weights_lose_what_the_format_loses():
    """9.5 % in the mean square, as the sheet of the format has it."""
    w = normal(3, 256, 256)
    error = np.asarray(dequantize_weight(quantize(w.astype(np.float32)))) - w
    assert 0.090 < np.sqrt((error**2).mean() / (w**2).mean()) < 0.100


@pytest.mark.parametrize("fill", [0.0, 1e-38, 3e38])
def test_tensors_of_one_value_and_of_nothing(fill):
    found = quantize(np.full((2, 32), fill, np.float32))
    np.testing.assert_allclose(dequantize_weight(found), fill, rtol=1e-6, atol=1e-36)
    assert found.nbytes() == 2 * 32 / 2 + 2 * 2 + 4


@pytest.mark.parametrize("shape", [(7, 37, 48), pytest.param((1, 16, 16), marks=pytest.mark.slow)])
def test_products_are_those_of_the_values_and_so_are_gradients(blocks, shape):
    x, w, values = draw(0, *shape)
    g = np.random.default_rng(1).normal(size=shape[:2]).astype(np.float32)
    for implementation in ("xla", "reference"):

        def product(x, total, implementation=implementation):
            full = dataclasses.replace(w, tensor_scale=total)
            return quantized_matmul(x, full, implementation=implementation)

        y, pull = jax.vjp(jax.jit(product), x, w.tensor_scale)
        dx, total = pull(jnp.asarray(g))
        close(y, x.astype(np.float64) @ values.T, 2e-6)
        close(dx, g.astype(np.float64) @ values, 2e-6)
        close(total, (g * (x.astype(np.float64) @ values.T)).sum() / float(w.tensor_scale), 1e-5)


def test_only_sums_and_the_result_round_in_bfloat16():
    x, w, values = draw(5, 9, 48, 256)
    x = jnp.asarray(x, jnp.bfloat16)
    y, pull = jax.vjp(jax.jit(lambda x: quantized_matmul(x, w, out_dtype=jnp.float32)), x)
    close(y, np.asarray(x, np.float64) @ values.T, 2e-6)
    (dx,) = pull(jnp.ones_like(y))
    assert dx.dtype == jnp.bfloat16
    close(dx, np.ones(y.shape) @ values, 2**-8)


def test_what_is_not_a_number_stays_where_it_belongs(blocks):
    x, w, _ = draw(6, 5, 37, 64)
    run = jax.jit(quantized_matmul)
    clean = np.asarray(run(x, w))
    x[3] = np.nan
    y = np.asarray(run(x, dataclasses.replace(w, scale=w.scale.at[1, 36].set(jnp.nan))))
    rows = np.delete(np.arange(5), 3)
    assert np.isnan(y[3]).all() and np.isnan(y[:, 36]).all()
    np.testing.assert_array_equal(y[rows, :36], clean[rows, :36])


def bad(x=None, **changes: Any) -> None:
    _, w, _ = draw(0, 4, 8, 32)
    quantized_matmul(jnp.zeros((4, 32)) if x is None else x, dataclasses.replace(w, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "w.bits=8: expected 4 with w.tensor_scale"),
        ({"codes": jnp.zeros((8, 16), jnp.int8)}, "w.codes.dtype='int8': expected uint8"),
        ({"codes": jnp.zeros(8, jnp.uint8)}, "w.codes.shape"),
        ({"codes": jnp.zeros((8, 12), jnp.uint8)}, r"w.codes.shape=\(8, 12\): .*K a multiple of 16"),
        ({"scale": jnp.zeros((8, 2), jnp.float8_e4m3fn)}, r"w.scale.shape=\(8, 2\): expected \(2, 8\)"),
        ({"scale": jnp.zeros((2, 8), jnp.float16)}, "w.scale.dtype='float16': expected float8_e4m3fn"),
        ({"offset": jnp.zeros((2, 8))}, "w.offset='an array': expected None"),
        ({"tensor_scale": jnp.zeros((1,))}, r"w.tensor_scale.shape=\(1,\): expected \(\)"),
        ({"tensor_scale": jnp.zeros((), jnp.float16)}, "w.tensor_scale.dtype='float16': expected float32"),
        ({"tensor_scale": None}, "w.scale.shape"),
        (
            {"x": QuantizedRows(jnp.zeros((4, 32), jnp.int8), jnp.zeros((4, 1)))},
            "w='NVFP4': .*quantised rows",
        ),
    ],
)
def test_bad_arguments_are_named(own_checks, changes, message):
    with pytest.raises(ValueError, match=message):
        bad(**changes)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (jnp.zeros(16), "w.shape=.*outputs first"),
        (jnp.zeros((2, 24)), "w.shape=.*K a multiple of 16; pad it"),
    ],
)
def test_weights_that_cannot_be_rounded_are_named(own_checks, w, message):
    with pytest.raises(ValueError, match=message):
        nvfp4.quantize_nvfp4(w)
