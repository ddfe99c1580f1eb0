"""Ancestors, depths and preceding rows of random trees against pointer chasing."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import tree
from tests.kernels.kernel_cases import values
from tests.kernels.tree_cases import path_to, random_parents

ROWS, REACH = 3, 3


@pytest.mark.parametrize("W", [1, 2, 7, 8])
@given(seed=st.integers(0, 2**31), shuffled=st.booleans(), padded=st.booleans())
def test_ancestors_and_depths_are_those_of_pointer_chasing(W, seed, shuffled, padded):
    rng = np.random.default_rng(seed)
    parents = random_parents(rng, ROWS, W, shuffled)
    live = rng.random((ROWS, W)) < 0.7 if padded else np.ones((ROWS, W), bool)
    got = values(tree.ancestors, {"parents": parents, "live": live})
    depth = values(tree.depths, {"ancestors": got})
    wanted, deep = np.zeros_like(got), np.full((ROWS, W), -1)
    for b, i in np.argwhere(live):
        path = path_to(parents[b], live[b], i)
        wanted[b, i, path], deep[b, i] = True, len(path) - 1
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(depth, deep)


def test_a_chain_needs_no_parents():
    live = np.array([[True] * 6, [True, False, True, True, False, True]])
    parents = np.tile(np.arange(-1, 5, dtype=np.int32), (2, 1))
    live, parents = jnp.asarray(live), jnp.asarray(parents)
    np.testing.assert_array_equal(tree.ancestors(None, live), tree.ancestors(parents, live))


@given(seed=st.integers(0, 2**31))
def test_preceding_rows_run_up_the_path_into_the_prefix(seed):
    rng = np.random.default_rng(seed)
    W = 7
    parents, live = random_parents(rng, ROWS, W, shuffled=True), rng.random((ROWS, W)) < 0.8
    seen = values(tree.ancestors, {"parents": parents, "live": live})
    depth = values(tree.depths, {"ancestors": seen})
    arrays = {"members": seen, "depth": depth, "since": depth}
    got = values(tree.preceding, arrays, before=REACH, count=REACH + 1)
    for b, i in np.argwhere(live):
        rows = [*range(REACH), *(REACH + np.array(path_to(parents[b], live[b], i)))]
        assert got[b, i].tolist() == rows[-REACH - 1 :]
    assert got.min() >= 0 and got.max() < REACH + W
