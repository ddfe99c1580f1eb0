"""One collective after the other."""

import jax
import jax.numpy as jnp
import numpy as np

from parallel.order import in_turn


def test_every_sum_needs_the_one_before_it_and_what_comes_first():
    """On one device a sum over an axis is the identity: what counts is who waits for whom."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    spec = jax.sharding.PartitionSpec()
    tree = {"a": jnp.arange(3.0), "b": jnp.int32(7), "c": jnp.full((2, 2), jnp.nan)}

    def run(tree, first):
        return in_turn(lambda x: jax.lax.psum(x, "data"), tree, first)

    over = jax.shard_map(run, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    found = jax.jit(over)(tree, jnp.float32(jnp.inf))
    for name, leaf in tree.items():
        assert found[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found[name], leaf)

    inner = jax.make_jaxpr(over)(tree, jnp.float32(1)).jaxpr.eqns[0].params["jaxpr"]
    needed: dict = {inner.invars[-1]: {"first"}}
    sums = 0
    for eqn in inner.eqns:
        behind = set().union(*(needed.get(x, set()) for x in eqn.invars if not hasattr(x, "val")))
        if eqn.primitive.name.startswith("psum"):
            # The first waits for what was given, and each of the others for all before it.
            assert {"first", *range(sums)} <= behind
            behind, sums = behind | {sums}, sums + 1
        needed |= dict.fromkeys(eqn.outvars, behind)
    assert sums == 3
