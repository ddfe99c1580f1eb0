"""Bits per byte of compressors and models."""

import gzip
import lzma
import math

import numpy as np
import pytest

from jaxllm.measure.compressors import bits_per_byte, gzip_bits_per_byte, xz_bits_per_byte


@pytest.mark.parametrize("measure", [gzip_bits_per_byte, xz_bits_per_byte])
def test_noise_costs_eight_bits_and_repetition_almost_none(measure):
    noise = np.random.default_rng(0).bytes(20_000)
    assert 8 <= measure(noise) < 8.1
    assert measure(b"abcd" * 20_000) < 0.05
    assert measure(noise) == measure(noise)
    with pytest.raises(ValueError, match="no bytes"):
        measure(b"")


def test_the_strongest_presets_are_used():
    text = " ".join(str(number * number) for number in range(20_000)).encode()
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
    assert gzip_bits_per_byte(text) < 8 * len(gzip.compress(text, 1, mtime=0)) / len(text)
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert xz_bits_per_byte(text) < 8 * len(lzma.compress(text, preset=0)) / len(text)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight():
    assert bits_per_byte(math.log(256), 70, 70) == pytest.approx(8)
    assert bits_per_byte(math.log(256), 70, 140) == pytest.approx(4)
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(1.0, 1, 0)
