"""Heads and windows come together in one place."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.cache.policies.heads import reduce_heads, repeat_live
from jaxllm.config import ConfigError


def test_heads_are_reduced_group_by_group():
    scores = np.arange(24.0, dtype=np.float32).reshape(1, 2, 3, 4)
    for how, wanted in (("max", np.max), ("mean", np.mean), ("sum", np.sum)):
        np.testing.assert_array_equal(reduce_heads(jnp.asarray(scores), how), wanted(scores, axis=2))
    with pytest.raises(ConfigError, match="reduce='median'"):
        reduce_heads(jnp.asarray(scores), "median")


def test_padding_repeats_the_first_live_query():
    q = jnp.arange(24.0).reshape(3, 4, 1, 2)
    live = jnp.asarray([[True, True, False, False], [False, True, True, True], [False] * 4])
    found = np.asarray(repeat_live(q, live))[:, :, 0, 0] // 2
    np.testing.assert_array_equal(found, [[0, 1, 0, 0], [5, 5, 6, 7], [8, 8, 8, 8]])
