"""Atom's W4A4: its formulas in float64, its sums in int64, and what the outliers' 8 bits are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.proof import lowering
from pallas_kernels.quantized_matmul import (
    AtomRows,
    AtomWeight,
    QuantizedRows,
    QuantizedWeight,
    atom,
    codes,
    quantized_matmul,
    unpack_codes,
)

# One program each.
outliers_last, atom_matmul = (
    jax.jit(atom.outliers_last),
    jax.jit(atom.atom_matmul, static_argnames="implementation"),
)
quantize_rows = jax.jit(atom.quantize_atom_rows, static_argnames="clip")
quantize_weight = jax.jit(
    atom.quantize_atom_weight, static_argnames=("clip", "shared", "scale_dtype"), keep_unused=True
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_groups(v, groups):
    return np.asarray(v).reshape(len(v), groups, -1)


def are_atoms(got, scale, values, top):
    """Codes are ``clamp(round(v / s), -top - 1, top)`` of float64 but for a hair about ties."""
    steps = values.astype(np.float64) / scale
    sure = np.abs(np.abs(steps - np.floor(steps)) - 0.5) > 1e-4
    np.testing.assert_array_equal(
        np.asarray(got)[sure], np.clip(np.round(steps), -top - 1, top)[sure].astype(np.int64)
    )
    return sure.mean() > 0.99


@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_rows_are_atoms(clip):
    """``s = max(|v|, 1e-5) clip / 7`` of each row and group; the last 128 unclipped in 8 bits."""
    x = normal(0, 5, 384)
    x[2, :128] = 0
    found = quantize_rows(x, clip=clip)
    body = by_groups(x[:, :256], 2)
    scale = np.maximum(np.abs(body).max(axis=2), 1e-5) * clip / 7
    np.testing.assert_allclose(found.body.scale, scale, rtol=1e-6)
    held = by_groups(found.body.codes, 2)
    assert are_atoms(held, scale[..., None], body, 7)
    # With 1 the grid ends at 7 either way; a clipped value may reach -8.
    assert held.max() == 7 and held.min() == (-7 if clip == 1 else -8)
    last = np.abs(x[:, 256:]).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(found.outliers.scale, last, rtol=1e-6)
    assert are_atoms(found.outliers.codes, last, x[:, 256:], 127)
    assert found.shape == (5, 384) and not held[2, 0].any()


@pytest.mark.parametrize("shared", [1, 2])
def test_weights_are_atoms(shared):
    """Two neighbouring outputs share a group of 256 values."""
    w = normal(1, 6, 384)
    found = quantize_weight(w, shared=shared, scale_dtype="float32")
    body = w[:, :256].reshape(6 // shared, shared, 2, 128)
    scale = np.repeat(np.abs(body).max(axis=(1, 3)) * 0.85 / 7, shared, axis=0)
    np.testing.assert_allclose(found.body.scale.T, scale, rtol=1e-6)
    held = by_groups(unpack_codes(found.body.codes), 2)
    assert are_atoms(held, scale[..., None], by_groups(w[:, :256], 2), 7)
    last = np.abs(w[:, 256:]).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(found.outliers.scale.T, last, rtol=1e-6)
    assert are_atoms(found.outliers.codes, last, w[:, 256:], 127)
    assert found.shape == (6, 384)


def test_bytes_of_a_weight():
    """4 bits of the body with a scale of 16 a group, 8 of the last 128 with one of 16 an output."""
    found = jax.eval_shape(atom.quantize_atom_weight, jax.ShapeDtypeStruct((64, 4096), jnp.float32))
    assert found.nbytes() == 64 * (3968 // 2 + 2 * 31 + 128 + 2)


def draw(M, N, K):
    """Codes of the whole range and power-of-two scales, which leave every float32 sum exact."""
    rng, groups = np.random.default_rng([M, N, K]), K // 128 - 1
    x, w = rng.integers(-8, 8, (M, K)), rng.integers(-8, 8, (N, K))
    x[:, -128:], w[:, -128:] = rng.integers(-128, 128, (M, 128)), rng.integers(-128, 128, (N, 128))
    shapes = ((M, groups), (groups, N), (M, 1), (1, N))
    scales = [2.0 ** rng.integers(-1, 2, shape) for shape in shapes]
    return x, w, scales


def held_as(x, w, scales):
    own, scale, own8, scale8 = (jnp.asarray(s, jnp.float32) for s in scales)
    rows = [QuantizedRows(jnp.asarray(v, jnp.int8), s) for v, s in ((x[:, :-128], own), (x[:, -128:], own8))]
    biased = (w[:, :-128] + 8).astype(np.uint8)
    body = QuantizedWeight(jnp.asarray(biased[:, ::2] | biased[:, 1::2] << 4), scale)
    return AtomRows(*rows), AtomWeight(
        body, QuantizedWeight(jnp.asarray(w[:, -128:], jnp.int8), scale8, None, 8)
    )


@pytest.mark.parametrize(
    "implementation", ["xla", "reference", pytest.param("mosaic_gpu", marks=pytest.mark.slow)]
)
def test_products_are_those_of_int64(implementation):
    x, w, scales = draw(5, 128, 384)
    parts = [v.astype(np.int64).reshape(len(v), 3, 128) for v in (x, w)]
    sums = np.einsum("mgk,ngk->gmn", *parts)
    own, scale, own8, scale8 = scales
    wanted = np.einsum("gmn,mg,gn->mn", sums[:2], own, scale) + sums[2] * own8 * scale8
    with compat.interpreted():
        y = atom_matmul(*held_as(x, w, scales), implementation=implementation)
    np.testing.assert_array_equal(np.asarray(y, np.float64), wanted)


def test_products_are_those_of_the_values_in_float64():
    x, w = normal(2, 7, 512), normal(3, 64, 512)
    order = np.random.default_rng(4).permutation(512)
    rows, weight = quantize_rows(x, order), quantize_weight(w, order)

    def values(body_codes, body_scale, last_codes, last_scale):
        body = by_groups(body_codes, 3) * np.asarray(body_scale, np.float64)[..., None]
        last = np.asarray(last_codes) * np.asarray(last_scale, np.float64)
        return np.concatenate([body.reshape(len(body), -1), last], axis=1)

    a = values(rows.body.codes, rows.body.scale, rows.outliers.codes, rows.outliers.scale)
    b = values(
        unpack_codes(weight.body.codes),
        weight.body.scale.T,
        weight.outliers.codes,
        weight.outliers.scale.T,
    )
    # What is multiplied stands in the order that was asked for, and is near what was given.
    assert np.abs(a - x[:, order]).max() < 0.6 and np.abs(b - w[:, order]).max() < 0.8
    np.testing.assert_allclose(atom_matmul(rows, weight), a @ b.T, atol=2e-6 * np.abs(a @ b.T).max())


def test_the_largest_inputs_come_last():
    energy = np.array([3.0, 1.0, 2.0, 1.0, 9.0], np.float32)
    np.testing.assert_array_equal(outliers_last(energy), [1, 3, 2, 0, 4])
    energy = np.abs(normal(5, 512))
    order = np.asarray(outliers_last(energy))
    np.testing.assert_array_equal(np.sort(order), np.arange(512))
    assert energy[order[:-128]].max() < energy[order[-128:]].min()


def off(y, exact):
    return np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(("divided", "most"), [(1, 0.04), (60, 0.2)], ids=["they decide", "the rest counts"])
def test_outliers_cost_far_less_in_eight_bits_than_in_four(divided, most):
    """Six inputs of 512 are 60 times larger: beside them the rest of a group is nothing in 4 bits."""
    x, w, calibration = normal(6, 32, 512), normal(7, 96, 512), normal(8, 256, 512)
    planted = np.array([5, 40, 170, 300, 301, 500])
    x[:, planted] *= 60
    calibration[:, planted] *= 60
    # As large as the rest in the product where divided: what is large in activations is small in weights.
    w[:, planted] /= divided
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    order = outliers_last((calibration**2).mean(axis=0))
    found = off(atom_matmul(quantize_rows(x, order), quantize_weight(w, order)), exact)
    # The same bits with the outliers where they were, among the rest.
    unordered = off(atom_matmul(quantize_rows(x), quantize_weight(w)), exact)
    # And without any 8 bits at all.
    plain = quantized_matmul(
        codes.quantize_rows(jnp.asarray(x), bits=4, group=128), codes.quantize_weight(jnp.asarray(w), bits=4)
    )
    assert found < most and min(unordered, off(plain, exact)) > 4 * found


def test_one_program_multiplies_it_on_hopper_and_xla_only_adds():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 384), (128, 384)))
    rows, weight = jax.eval_shape(atom.quantize_atom_rows, x), jax.eval_shape(atom.quantize_atom_weight, w)
    text = lowering.lower_cuda(lambda x, w: atom.atom_matmul(x, w, implementation="mosaic_gpu"), rows, weight)
    for name in ("quantized_matmul_packed", "quantized_matmul_codes"):
        lowering.require_kernel(text, "mosaic_gpu", name)
    assert lowering.outside(text).dots == 0


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (atom.outliers_last, (jnp.zeros((2, 2)),), r"energy.shape=\(2, 2\): expected one dimension"),
        (atom.quantize_atom_rows, (jnp.zeros((2, 128)),), "x.shape=.*K a multiple of 128, 256 or more"),
        (atom.quantize_atom_weight, (jnp.zeros((2, 320)),), "w.shape=.*K a multiple of 128"),
        (atom.quantize_atom_weight, (jnp.zeros((3, 256)),), "shared=2: .*divisor of N = 3"),
        (atom.quantize_atom_rows, (jnp.zeros((2, 256)), jnp.arange(128)), "order"),
        (atom.quantize_atom_rows, (jnp.zeros((2, 256)), jnp.zeros(256)), "order.dtype='float32'"),
    ],
)
def test_bad_arguments_are_named(own_checks, function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_rows_and_weights_of_other_inputs_are_refused():
    rows, weight = quantize_rows(jnp.ones((2, 256))), quantize_weight(jnp.ones((2, 384)))
    with pytest.raises(ValueError, match=r"x.shape=\(2, 256\): expected K \(second\) to be 384"):
        atom.atom_matmul(rows, weight)
