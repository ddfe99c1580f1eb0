"""Tokens to workers' slots and back: padding is zeros on either side, and the ways are each other's transposes."""

import jax
import jax.numpy as jnp
import numpy as np

from parallel.context import PlanConfig, from_slots, layout, make_plan, to_slots


def test_every_token_goes_to_its_place_and_comes_back():
    lengths, beyond = [9, 1, 6, 2], 3
    index = layout(make_plan(lengths, PlanConfig(3, block=4))).index
    used, where = index >= 0, jnp.asarray(index)
    assert not used.all()
    x = np.random.default_rng(0).integers(1, 99, (sum(lengths) + beyond, 2)).astype(np.float32)
    slots, back = jax.vjp(lambda x: to_slots(x, where), jnp.asarray(x))
    np.testing.assert_array_equal(slots, np.where(used[..., None], x[index], 0))
    known = np.where(np.arange(len(x))[:, None] < sum(lengths), x, 0)
    np.testing.assert_array_equal(from_slots(slots, where, len(x)), known)
    # What stands in padding belongs to no token.
    filled = jnp.where(used[..., None], slots, 7)
    np.testing.assert_array_equal(from_slots(filled, where, len(x)), known)
    np.testing.assert_array_equal(back(filled)[0], known)
