"""Codes of weights and activations: packing, half a step of error, what is kept exactly, Atom's formula by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.quantized_matmul import QuantizedWeight, codes, pack_codes, unpack_codes
from tests.kernels.kernel_cases import normal

# One program each: op by op they take most of a minute to compile.
quantize_weight = jax.jit(
    codes.quantize_weight, static_argnames=("bits", "group", "symmetric", "clip", "scale_dtype")
)
quantize_rows = jax.jit(codes.quantize_rows, static_argnames=("group", "clip"))
dequantize_weight, dequantize_rows = jax.jit(codes.dequantize_weight), jax.jit(codes.dequantize_rows)
signed_codes = jax.jit(codes.signed_codes)


def test_every_pair_of_codes_has_its_byte():
    even, odd = np.meshgrid(np.arange(-8, 8), np.arange(-8, 8), indexing="ij")
    given = jnp.asarray(np.stack([even.reshape(-1), odd.reshape(-1)], axis=1), jnp.int8)
    packed = pack_codes(given)
    assert packed.dtype == jnp.uint8 and packed.shape == (256, 1)
    np.testing.assert_array_equal(packed[:, 0], (even + 8 + 16 * (odd + 8)).reshape(-1))
    np.testing.assert_array_equal(unpack_codes(packed), given)
    # Bit for bit what XLA's own four-bit integers are, but for the sign of the bias.
    theirs = jax.lax.bitcast_convert_type(packed ^ 0x88, jnp.int4).reshape(256, 2)
    np.testing.assert_array_equal(theirs.astype(jnp.int8), given)


@pytest.mark.parametrize(
    ("bits", "symmetric", "group"),
    [(4, True, 128), (4, False, 64), (4, True, 32), (8, True, 128), (8, True, None), (4, False, None)],
)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("centre", [0.0, 5.0])
def test_values_are_off_by_at_most_half_a_step(bits, symmetric, group, dtype, centre):
    w = normal(0, 24, 256) * (1.0 if centre == 0 else 0.4) + centre
    found = quantize_weight(jnp.asarray(w), bits=bits, symmetric=symmetric, group=group, scale_dtype=dtype)
    assert (found.shape, found.group) == (w.shape, group or 256)
    parts = w.reshape(24, -1, found.group)
    low, high = parts.min(axis=2, keepdims=True), parts.max(axis=2, keepdims=True)
    top = 2 ** (bits - 1) - 1
    largest = np.abs(parts).max(axis=2, keepdims=True)
    step = largest / top if symmetric else (high - low) / (2 * top + 1)
    lost = float(jnp.finfo(dtype).eps)
    error = np.abs(np.asarray(dequantize_weight(found)).reshape(parts.shape) - parts)
    # Rounding of the scale moves the ends of the range, that of the offset everything.
    assert np.all(error <= 0.5 * step * (1 + lost) + lost * (largest + high - low) + 1e-6)
    # Codes reach the ends.
    held = np.asarray(signed_codes(found))
    assert held.max() == top and (symmetric or held.min() == -top - 1)


@given(
    seed=st.integers(0, 2**31),
    clip=st.sampled_from([1.0, 0.85]),
    magnitude=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_symmetric_codes_are_atoms(seed, clip, magnitude):
    """``s = max(|v|, 1e-5) clip / 7, q = clamp(round(v / s), -8, 7)`` group by group, in float64."""
    w = np.random.default_rng(seed).normal(size=(4, 64)) * magnitude
    found = quantize_weight(jnp.asarray(w, jnp.float32), group=32, clip=clip, scale_dtype=jnp.float32)
    held = np.asarray(signed_codes(found))
    for n in range(4):
        for g in range(2):
            v = w[n, 32 * g : 32 * g + 32].astype(np.float32).astype(np.float64)
            s = max(np.abs(v).max(), 1e-5) * clip / 7
            np.testing.assert_allclose(found.scale[g, n], s, rtol=1e-6)
            exact = v / s
            # Float32 may round another way within a hair of a tie.
            sure = np.abs(np.abs(exact - np.floor(exact)) - 0.5) > 1e-4
            wanted = np.clip(np.round(exact), -8, 7)
            np.testing.assert_array_equal(held[n, 32 * g : 32 * g + 32][sure], wanted[sure])


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_was_rounded_once_stays(symmetric):
    """Power-of-two scales make the grid exact."""
    rng = np.random.default_rng(1)
    grid_codes = rng.integers(-7 if symmetric else -8, 8, (8, 64)).astype(np.int8)
    grid_codes[:, ::32], grid_codes[:, 1::32] = 7, -7 if symmetric else -8
    grid = QuantizedWeight(
        pack_codes(jnp.asarray(grid_codes)),
        jnp.full((2, 8), 0.25, jnp.float16),
        None if symmetric else jnp.full((2, 8), 3.0, jnp.float16),
    )
    again = quantize_weight(dequantize_weight(grid), group=32, symmetric=symmetric)
    np.testing.assert_array_equal(signed_codes(again), grid_codes)
    np.testing.assert_array_equal(dequantize_weight(again), dequantize_weight(grid))


def test_groups_of_one_value_and_of_nothing():
    np.testing.assert_array_equal(dequantize_weight(quantize_weight(jnp.zeros((2, 64)), group=32)), 0)
    constant = quantize_weight(jnp.full((2, 64), 3.5), group=32, symmetric=False)
    np.testing.assert_array_equal(dequantize_weight(constant), 3.5)


def test_small_groups_are_not_lost_to_the_scales_dtype():
    """A step that float16 would round to 0 becomes the least that it has."""
    found = quantize_weight(jnp.full((1, 32), 1e-7), group=32, symmetric=False)
    assert np.isfinite(dequantize_weight(found)).all()
    tiny = quantize_weight(jnp.linspace(-1e-7, 1e-7, 32)[None], group=32, symmetric=False)
    assert float(tiny.scale[0, 0]) > 0
    assert np.abs(np.asarray(dequantize_weight(tiny))).max() < 1e-6


def test_groups_and_rows_do_not_know_each_other():
    w = normal(3, 4, 128)
    before = quantize_weight(jnp.asarray(w), group=32)
    w[2, 32:64] *= 100
    after = quantize_weight(jnp.asarray(w), group=32)
    changed = np.asarray(before.scale) != np.asarray(after.scale)
    assert changed.sum() == 1 and changed[1, 2]


def test_bytes_held():
    """4.125 bits a weight with groups of 128 and scales of 16 bits."""
    assert quantize_weight(jnp.zeros((64, 256))).nbytes() * 8 / (64 * 256) == 4.125


@pytest.mark.parametrize("group", [None, 32])
def test_rows_are_atoms_too(group):
    x = normal(4, 5, 64)
    found = quantize_rows(jnp.asarray(x), group=group)
    parts = x.reshape(5, -1, group or 64)
    scale = np.abs(parts).max(axis=2) / 127
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
    assert np.abs(np.asarray(found.codes)).max() == 127
    error = np.abs(np.asarray(dequantize_rows(found)).reshape(parts.shape) - parts)
    assert np.all(error <= 0.5 * scale[..., None] * (1 + 1e-5))
    clipped = quantize_rows(jnp.asarray(x), group=group, clip=0.9)
    np.testing.assert_allclose(clipped.scale, 0.9 * scale, rtol=1e-6)
    np.testing.assert_array_equal(quantize_rows(jnp.zeros((2, 64))).codes, 0)


def test_a_weight_is_a_pytree_whose_bits_are_static():
    leaves, tree = jax.tree.flatten(quantize_weight(jnp.ones((4, 32)), group=32, bits=8))
    assert len(leaves) == 2
    assert jax.tree.unflatten(tree, leaves).bits == 8


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        (quantize_weight, {"bits": 2}, "bits=2: expected 4 or 8"),
        (quantize_weight, {"group": 16}, r"group=16: expected one of \(32, 64, 128\)"),
        (quantize_weight, {"group": 128}, "w.shape=.*K a multiple of 128"),
        (quantize_weight, {"clip": 0.0}, "clip=0.0"),
        (quantize_weight, {"clip": 1.5}, "clip=1.5"),
        (quantize_weight, {"bits": 8, "symmetric": False}, "symmetric=False: expected True with 8 bits"),
        (quantize_weight, {"scale_dtype": jnp.int8}, "scale_dtype='int8'"),
        (quantize_weight, {"w": jnp.zeros(64)}, "outputs first"),
        (quantize_weight, {"w": jnp.zeros((2, 5)), "group": None}, "K a multiple"),
        (quantize_rows, {"x": jnp.zeros(64)}, "x.shape"),
        (quantize_rows, {"group": 16}, "group=16"),
        (quantize_rows, {"group": 128}, "x.shape=.*K a multiple of 128"),
        (quantize_rows, {"clip": 2}, "clip=2"),
        (pack_codes, {"codes": jnp.zeros((2, 3), jnp.int8)}, "an even last dimension; pad it"),
    ],
)
def test_bad_arguments_are_named(own_checks, function, changes, message):
    defaults = {
        quantize_weight: {"w": jnp.zeros((2, 64)), "group": 32},
        quantize_rows: {"x": jnp.zeros((2, 64))},
        pack_codes: {},
    }
    with pytest.raises(ValueError, match=message):
        function(**(defaults[function] | changes))
