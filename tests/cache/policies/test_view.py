"""A view shows stored tokens in order, wherever their pages lie."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.cache.bits import store
from tests.cache.policies.views import layout, view


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(0, 27), min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_stored_tokens_come_out_in_order(lengths: list[int], seed: int):
    rng, sizes = np.random.default_rng(seed), layout()
    k, v = rng.normal(size=(2, len(lengths), 2, sizes.tokens, 8)).astype(np.float32)
    seen = view(sizes, k, v, lengths, rng)
    assert seen.tokens == sizes.tokens
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(seen.keys()[row, :, :length], k[row, :, :length])
        np.testing.assert_array_equal(seen.values()[row, :, :length], v[row, :, :length])
        assert not np.any(seen.keys()[row, :, length:])
        assert int(seen.stored()[row].sum()) == length == int(seen.length[row])
    tokens = np.stack([rng.permutation(sizes.tokens)[:5] for _ in range(2 * len(lengths))])
    tokens = tokens.reshape(len(lengths), 2, 5)
    tokens = np.where(tokens < np.asarray(lengths)[:, None, None], tokens, -1)
    for read, values in ((seen.read_keys, k), (seen.read_values, v)):
        wanted = np.take_along_axis(values, np.maximum(tokens, 0)[..., None], axis=2)
        np.testing.assert_array_equal(read(jnp.asarray(tokens)), np.where(tokens[..., None] < 0, 0, wanted))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_pages_are_shown_as_attention_multiplies_them(bits: int):
    rng, sizes = np.random.default_rng(bits), layout()
    k, v = rng.normal(size=(2, 2, 2, sizes.tokens, 8)).astype(np.float32)
    seen = view(sizes, k, v, [11, 18], rng, bits)
    error = np.abs(np.asarray(seen.keys())[1, :, :18] - k[1, :, :18])
    step = np.ptp(k[1, :, :18], axis=-1, keepdims=True) / (2**bits - 1)
    assert np.all(error <= 0.51 * step) and error[:, :16].max() > 0 and not error[:, 16:].any()
    tokens = jnp.asarray([[[3, 10], [8, 0]], [[17, 15], [16, -1]]])
    np.testing.assert_array_equal(
        seen.read_keys(tokens)[1, 0], np.asarray(seen.keys())[1, 0, np.asarray([17, 15])]
    )


def test_pages_that_are_bits_of_bfloat16_are_shown_as_their_floats():
    rng, sizes = np.random.default_rng(0), layout()
    k, v = rng.normal(size=(2, 2, 2, sizes.tokens, 8)).astype(np.float32)
    floats = view(sizes, k, v, [11, 18], rng)
    seen = replace(
        floats, k_pages=store(floats.k_pages, jnp.uint16), v_pages=store(floats.v_pages, jnp.uint16)
    )
    rounded = np.asarray(jnp.asarray(k).astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(seen.keys()[0, :, :8], rounded[0, :, :8])
    # The open tail is as it was.
    np.testing.assert_array_equal(seen.keys()[0, :, 8:11], k[0, :, 8:11])
    tokens = jnp.asarray([[[3, 10], [8, 0]], [[17, 15], [16, -1]]])
    rounded = np.asarray(jnp.asarray(v).astype(jnp.bfloat16), np.float32)
    wanted = np.stack([v[1, 0, 17], rounded[1, 0, 15]])
    np.testing.assert_array_equal(seen.read_values(tokens)[1, 0], wanted)
