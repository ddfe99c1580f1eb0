"""What a device computes with of parameters at rest, and the way of gradients back, beside NumPy that knows no mesh."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from parallel.mesh import AXES, MeshShape, make_mesh
from parallel.sharding import TABLE, Placement


def axis(*segments: dict[str, int]):
    """An axis as `parallel.sharding` takes it."""
    return tuple(tuple(segment.items()) for segment in segments)


LAYERS, EMBED, MLP, EXPERTS = (
    axis({name: size}) for name, size in (("layers", 2), ("embed", 16), ("mlp", 8), ("experts", 4))
)
GATE_UP = axis({"mlp": 8}, {"mlp": 8})
KEYS = axis({"kv_heads": 2, "head_dim": 3})
# Segments that `tensor` cuts inside, of which devices have copies, and that all have.
FUSED = axis({"part": 2, "mlp": 8}, {"kv_heads": 2, "head_dim": 3}, {"state": 5})
ARRAYS = {
    "norm": (EMBED,),
    "bias": (MLP,),
    "fused bias": (FUSED,),
    "taps": (axis({"conv_width": 3}), FUSED),
    "columns": (EMBED, MLP),
    "rows": (MLP, EMBED),
    "queries": (EMBED, axis({"kv_heads": 2, "q_heads_per_kv_head": 2, "head_dim": 3})),
    "keys": (EMBED, KEYS),
    "fused": (EMBED, FUSED),
    "router": (EMBED, EXPERTS),
    "down": (EXPERTS, MLP, EMBED),
    "gate and up": (EXPERTS, EMBED, GATE_UP),
    "stacked": (LAYERS, EMBED, MLP),
    "stacked down": (LAYERS, EXPERTS, MLP, EMBED),
}
MESHES = (
    MeshShape(fsdp=2, tensor=2, expert=2),
    MeshShape(data=2, tensor=4),
    MeshShape(data=2, fsdp=2, tensor=2),
    MeshShape(data=2, expert=4),
)


def indices(segment, own: int, devices: int) -> list[int]:
    """Of a segment's numbers those that one of the devices along `tensor` computes with."""
    cut = [place for place, (name, _) in enumerate(segment) if TABLE.get(name) == ("tensor",)]
    sizes = [size for _, size in segment]
    if not cut:
        return list(range(prod(sizes)))
    size, after = prod(sizes[cut[0] : cut[-1] + 1]), prod(sizes[cut[-1] + 1 :])
    # Several to a device, or one to several devices.
    return [i for i in range(prod(sizes)) if (i // after % size) in owned(size, own, devices)]


def owned(size: int, own: int, devices: int) -> range:
    first = own * size // devices
    return range(first, first + max(1, size // devices))


def at_hand(axes, at: dict[str, int], shape: MeshShape) -> tuple[np.ndarray, ...]:
    """What `Placement.share` shall leave on the device at ``at``, as an index of the whole array."""
    found = []
    # Of what has three axes and more, layers apart: a vector or the router is of all experts.
    stack = len(axes) - (axes[0] == LAYERS) >= 3
    for each in axes:
        if stack and each == EXPERTS:
            found.append(list(owned(4, at["expert"], shape.expert)))
            continue
        places, first = [], 0
        for segment in each:
            places += [first + i for i in indices(segment, at["tensor"], shape.tensor)]
            first += prod(size for _, size in segment)
        found.append(places)
    return np.ix_(*found)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_shares_and_gradients_are_those_of_whole_arrays(shape):
    rng, place = np.random.default_rng(0), Placement(make_mesh(shape))
    specs = {name: place.spec(axes) for name, axes in ARRAYS.items()}
    devices = [dict(zip(AXES, at)) for at in np.ndindex(*shape.sizes)]
    # Small whole numbers: sums in any order are exact.
    whole, hands, goals = {}, {}, {}
    for name, axes in ARRAYS.items():
        sizes = [sum(prod(size for _, size in segment) for segment in each) for each in axes]
        whole[name] = rng.integers(-9, 10, sizes).astype(np.float32)
        hands[name] = [at_hand(axes, at, shape) for at in devices]
        goals[name] = rng.integers(-9, 10, (8, *whole[name][hands[name][0]].shape)).astype(np.float32)

    def share(name, x):
        if ARRAYS[name][0] == LAYERS:
            return jnp.stack([place.share(each, ARRAYS[name]) for each in x])
        return place.share(x, ARRAYS[name])

    def local(arrays, goals, number):
        made, back = jax.vjp(lambda arrays: {n: share(n, x)[None] for n, x in arrays.items()}, arrays)
        grads = place.sum_gradients(back(goals)[0], specs)
        return made, grads, place.sum_rows(number), place.sum_tensor(number)

    each = P(AXES)
    run = jax.jit(
        jax.shard_map(
            local,
            mesh=place.mesh,
            in_specs=(specs, each, each),
            out_specs=(each, specs, each, each),
            check_vma=False,
        )
    )
    made, grads, rows, parts = run(whole, goals, np.arange(8.0, dtype=np.float32))
    for name, axes in ARRAYS.items():
        total = np.zeros_like(whole[name])
        for hand, goal in zip(hands[name], goals[name]):
            np.add.at(total, hand, goal)
        expected = np.stack([whole[name][hand] for hand in hands[name]])
        np.testing.assert_array_equal(made[name], expected, err_msg=name)
        np.testing.assert_array_equal(grads[name], total, err_msg=name)
        # Cut at rest, but for what is small.
        assert (place.shares(axes) > 1) == (EMBED in axes and len(axes) > 1), name
    for found, axes in ((rows, TABLE["rows"]), (parts, ("tensor",))):
        others = [tuple(at[name] for name in AXES if name not in axes) for at in devices]
        expected = [sum(n for n, each in enumerate(others) if each == mine) for mine in others]
        np.testing.assert_array_equal(found, expected)
