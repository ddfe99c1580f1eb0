"""Packing and rounding of pages of keys and values."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import QuantizedPages, dequantize_pages, quantize_pages
from pallas_kernels.paged_attention.operands import _cut
from pallas_kernels.paged_attention.quantized import pack_nibbles, unpack_nibbles
from tests.kernels.kernel_cases import normal

SHAPE = (3, 2, 4, 8)


def test_packing_is_undone_exactly():
    """All pairs of codes; channel j and j + d / 2 share a byte, j in its low nibble."""
    low, high = (w.ravel() for w in np.meshgrid(np.arange(16), np.arange(16)))
    codes = jnp.asarray(np.stack([low, high], axis=-1), jnp.uint8)
    packed = pack_nibbles(codes)
    assert packed.dtype == jnp.uint8 and packed.shape == (256, 1)
    np.testing.assert_array_equal(packed[:, 0], low + 16 * high)
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)
    wide = jnp.asarray(np.random.default_rng(0).integers(0, 16, (5, 3, 12)), jnp.uint8)
    np.testing.assert_array_equal(unpack_nibbles(pack_nibbles(wide)), wide)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("scale_dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("centre", [0.0, 5.0])
def test_values_are_off_by_at_most_half_a_step(bits, per_channel, scale_dtype, centre):
    """And by what rounding the offset (2 ^ -mantissa of it) and the scale (likewise, of the range) may add."""
    pages = normal(0, *SHAPE) * (1 if centre == 0 else 0.4) + centre
    found = quantize_pages(jnp.asarray(pages), bits=bits, per_channel=per_channel, scale_dtype=scale_dtype)
    assert (found.shape, found.per_channel) == (SHAPE, per_channel)
    values = np.asarray(dequantize_pages(found))
    axis = 2 if per_channel else 3
    low, high = (f(pages, axis=axis, keepdims=True) for f in (np.min, np.max))
    lost = float(jnp.finfo(scale_dtype).eps)
    step = (high - low) / (2**bits - 1)
    assert np.all(
        np.abs(values - pages) <= 0.5 * step * (1 + lost) + lost * (np.abs(low) + high - low) + 1e-6
    )


@pytest.mark.parametrize("per_channel", [False, True])
def test_what_was_rounded_once_stays(per_channel):
    """Power-of-two scales make the grid exact, so that quantising its points finds the same codes."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, SHAPE)
    axis = 2 if per_channel else 3
    np.put_along_axis(codes, codes.argmin(axis=axis, keepdims=True), 0, axis=axis)
    np.put_along_axis(codes, codes.argmax(axis=axis, keepdims=True), 15, axis=axis)
    pages = jnp.asarray(codes * 0.25 - 1, jnp.float32)
    found = quantize_pages(pages, bits=4, per_channel=per_channel)
    np.testing.assert_array_equal(unpack_nibbles(found.codes), codes)
    np.testing.assert_array_equal(dequantize_pages(found), pages)


def test_constant_groups_are_kept():
    pages = jnp.full(SHAPE, 3.5)
    np.testing.assert_array_equal(dequantize_pages(quantize_pages(pages, bits=4)), pages)


def test_three_parts_are_the_whole():
    """Compiled too: a conversion there and back would be dropped as excess precision, and the rest be 0."""
    import jax

    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 5, 8)) * 10.0 ** rng.integers(-20, 20, (3, 5, 8))).astype(np.float32)
    for cut in (_cut, jax.jit(_cut)):
        parts = np.asarray(cut(x)).reshape(3, 3, 5, 8)
        np.testing.assert_array_equal(parts, np.asarray(jnp.asarray(parts).astype(jnp.bfloat16), np.float32))
        np.testing.assert_array_equal(parts.astype(np.float64).sum(axis=1), x)


def test_bytes_held():
    found = quantize_pages(jnp.zeros((2, 2, 16, 128)), bits=4)
    # 68 bytes a token and head instead of 256.
    assert found.nbytes() == 2 * 2 * 16 * 68


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits=3: expected 4 or 8"),
        ({"scale_dtype": jnp.int8}, "scale_dtype='int8'"),
        ({"pages": jnp.zeros((2, 2, 4))}, "pages.shape"),
        ({"pages": jnp.zeros((2, 2, 1, 4))}, "at least two tokens"),
        ({"pages": jnp.zeros((2, 2, 4, 3))}, "an even last dimension"),
    ],
)
def test_bad_arguments_are_named(own_checks, changes, message):
    with pytest.raises(ValueError, match=message):
        quantize_pages(**({"pages": jnp.zeros(SHAPE), "bits": 4} | changes))


def test_pages_are_a_pytree_whose_bits_are_static():
    import jax

    found = quantize_pages(jnp.ones(SHAPE), bits=8)
    leaves, tree = jax.tree.flatten(found)
    assert len(leaves) == 3
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, QuantizedPages) and again.bits == 8
