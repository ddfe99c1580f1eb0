"""Windows score every token once; packing loses no item."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm import ConfigError
from jaxllm.evaluate.windows import bucket, pack, strided_windows


@given(length=st.integers(0, 200), window=st.integers(2, 70), data=st.data())
def test_every_token_but_the_first_is_scored_once_with_the_promised_context(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    seen = []
    for part in strided_windows(np.arange(length), window, stride):
        assert len(part.tokens) <= window
        np.testing.assert_array_equal(np.diff(part.tokens), 1)
        for place in range(part.first, len(part.tokens)):
            token = int(part.tokens[place])
            seen.append(token)
            assert place >= min(token, window - stride)
    assert seen == list(range(1, length))


def test_windows_follow_the_hugging_face_guide():
    got = [(part.tokens[0], part.tokens[-1], part.scored) for part in strided_windows(np.arange(10), 4, 2)]
    assert got == [(0, 3, 3), (2, 5, 2), (4, 7, 2), (6, 9, 2)]


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 8), (8, 9)])
def test_impossible_windows_are_refused_by_name(window, stride):
    with pytest.raises(ConfigError, match="window=1" if window == 1 else f"stride={stride}"):
        list(strided_windows(np.arange(20), window, stride))


@given(lengths=st.lists(st.integers(1, 64), max_size=60))
def test_packing_keeps_every_item_within_capacity(lengths):
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)


def test_buckets_are_few_and_large_enough():
    sizes = {bucket(n) for n in range(1, 2049)}
    assert all(bucket(n) >= n for n in range(1, 2049))
    assert len(sizes) <= 11
