"""Every planned block arrives once where the plan says, by every back end, and gradients go the same way back."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from pallas_kernels.target import Target
from parallel.context import STRATEGIES, Exchange, lane_specs, make_lanes, own, plan_specs
from parallel.context.halo import halo
from tests.parallel.eight_devices.common import AXIS, batches, packed, roomy, workers

# Workers, tokens of a block, slots, rounds of a stage; and how many tokens fit.
SHAPES = {(8, 4, 6, 12): 110, (3, 8, 5, 4): 70}
BACKENDS = ["rotate", "allgather", "ragged"]


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """``lax.ragged_all_to_all`` as documented, which XLA:CPU lacks; NaN where the two ends do not agree."""
    everything = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    me, row = jax.lax.axis_index(axis_name), jnp.arange(len(operand))
    rows, first, size, place = everything[0], *(x[:, me, None] for x in everything[1:])
    at = jnp.where(row < size, place + row, len(output))
    sent = jax.vmap(lambda x, first: jnp.take(x, first + row, axis=0, mode="clip"))(rows, first)
    output = output.at[at.reshape(-1)].set(sent.reshape(-1, *output.shape[1:]), mode="drop")
    return jnp.where(jnp.all(size[:, 0] == recv_sizes), output, jnp.nan)


@pytest.fixture
def ragged_on_cpu(monkeypatch):
    monkeypatch.setattr("jax.lax.ragged_all_to_all", emulated)
    monkeypatch.setattr("parallel.context.exchange.target", lambda: Target("cuda", "emulated"))


@cache
def programs(shape, rounds, backend):
    """(everything that arrives, everything given back), jitted: [N, S, ...] to [N, R, ...] and back, both of pairs."""
    capacity = roomy(*shape)
    capacity = capacity if rounds == "rotations" else replace(capacity, shifts=())
    exchange = Exchange(capacity, AXIS, backend)
    arrays, _ = plan_specs(AXIS)

    def fetch(tree, plan):
        tree, plan = own(tree), own(plan)
        stages = [exchange.fetch(tree, plan, stage) for stage in range(capacity.stages)]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[None], *stages)

    def give_back(home, tree, plan):
        home, tree, plan = own(home), own(tree), own(plan)
        for stage in range(capacity.stages):
            part = slice(stage * capacity.stage_rounds, (stage + 1) * capacity.stage_rounds)
            home = exchange.give_back(home, jax.tree.map(lambda x, s=part: x[s], tree), plan, stage)
        return jax.tree.map(lambda x: x[None], home)

    over = partial(jax.shard_map, mesh=workers(shape[0]), out_specs=PartitionSpec(AXIS), check_vma=False)
    each = PartitionSpec(AXIS)
    return (
        capacity,
        jax.jit(over(fetch, in_specs=(each, arrays))),
        jax.jit(over(give_back, in_specs=(each, each, arrays))),
    )


def draws():
    return st.sampled_from(list(SHAPES)).flatmap(
        lambda shape: st.tuples(st.just(shape), batches(SHAPES[shape], shape[1]))
    )


@pytest.mark.usefixtures("ragged_on_cpu")
@pytest.mark.parametrize(
    ("rounds", "backend"), [("rotations", b) for b in BACKENDS] + [("matchings", b) for b in BACKENDS[1:]]
)
@given(draws(), st.sampled_from(STRATEGIES))
def test_blocks_arrive_once_and_gradients_return(rounds, backend, drawn, strategy):
    shape, lengths = drawn
    capacity, fetch, give_back = programs(shape, rounds, backend)
    batch = packed(lengths, capacity, strategy, rounds)
    plan, where = batch.plan.arrays, batch.places
    # Small whole numbers: sums in any order are exact.
    rng = np.random.default_rng(len(lengths))
    x = {
        "marks": np.stack([where.segment_ids, where.positions], axis=-1).astype(np.float32) + 1,
        "noise": rng.integers(-9, 10, (*where.index.shape[:2], 3)).astype(np.float32),
    }
    arrived = jax.tree.map(np.asarray, fetch(x, plan))
    ramp = plan.receive_position[..., None] + np.arange(capacity.block)
    marks = np.stack([np.broadcast_to(plan.receive_document[..., None] + 1, ramp.shape), ramp], axis=-1) + 1
    there = plan.receive_from >= 0
    np.testing.assert_array_equal(arrived["marks"], np.where(there[..., None, None], marks, 0))
    sent = x["noise"][plan.receive_from, plan.receive_slot]
    np.testing.assert_array_equal(arrived["noise"], np.where(there[..., None], sent, 0))
    # <A x, y> = <x, A' y>, and what was at home is still there.
    y = jax.tree.map(lambda a: rng.integers(-9, 10, a.shape).astype(np.float32), arrived)
    home = jax.tree.map(np.ones_like, x)
    back = jax.tree.map(np.asarray, give_back(home, y, plan))
    for name in x:
        assert (arrived[name] * y[name]).sum() == (x[name] * (back[name] - home[name])).sum()
    assert there.any() == bool(batch.plan.balance.transfers)


def test_inputs_before_a_lane_are_those_of_its_document():
    batch = packed([60, 3, 9, 20, 2], roomy(8, 4, 6, 12), "fcp")
    lanes = make_lanes(batch.plan, reach=5)
    x = np.random.default_rng(0).standard_normal((48, 4, 3)).astype(np.float32)
    assert (lanes.halo < 0).any() and (lanes.halo >= 0).any()
    for reach in (1, 3, 5):
        before = partial(halo, axis=AXIS, reach=reach)
        specs = PartitionSpec(AXIS), lane_specs(AXIS)
        over = jax.shard_map(
            before, mesh=workers(8), in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False
        )
        wanted = lanes.halo[..., 5 - reach :].reshape(-1, reach)
        expected = np.where(wanted[..., None] < 0, 0, x.reshape(-1, 3)[wanted])
        np.testing.assert_array_equal(jax.jit(over)(x, lanes), expected)


def test_back_ends_agree_bit_for_bit():
    shape = (8, 4, 6, 12)
    batch = packed([60, 3, 9, 20, 2], roomy(*shape), "fcp")
    noise = np.random.default_rng(0).standard_normal((8, 6, 4, 5)).astype(np.float32)
    arrived = [programs(shape, "rotations", backend)[1](noise, batch.plan.arrays) for backend in BACKENDS[:2]]
    np.testing.assert_array_equal(*arrived)
    assert batch.plan.balance.transfers > 20


def test_ragged_is_refused_on_cpus_and_traced_for_gpus():
    capacity = roomy(8, 4, 6, 12)
    exchange = Exchange(capacity, AXIS, "ragged")
    batch = packed([60, 3, 9, 20, 2], capacity, "fcp")
    arrays, _ = plan_specs(AXIS)

    def moved(mesh, k, plan):
        def there_and_back(k, plan):
            k, plan = k[0], own(plan)
            came = exchange.fetch((k, 2 * k), plan, 0)
            return sum(exchange.give_back((k, k), came, plan, 0))[None]

        specs = PartitionSpec(AXIS), arrays
        return jax.shard_map(
            there_and_back, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False
        )(k, plan)

    k = jnp.ones((8, 6, 4, 2, 8))
    with pytest.raises(ValueError, match=r"ragged.*'rotate' or 'allgather' on CPUs"):
        jax.jit(partial(moved, workers(8)))(k, batch.plan.arrays)
    gpus = AbstractMesh((8,), (AXIS,), abstract_device=AbstractDevice("NVIDIA H200", None, "gpu"))
    with jax.sharding.use_abstract_mesh(gpus):
        text = (
            jax.jit(partial(moved, gpus))
            .trace(k, batch.plan.arrays)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    # Of keys and values, there and back.
    assert text.count("@ragged_all_to_all") == 4
    assert "all_gather" not in text and "collective_permute" not in text


def test_errors_name_what_was_given():
    with pytest.raises(ValueError, match=r"backend='rotat'.*rotate, allgather, ragged"):
        Exchange(roomy(2, 4, 3, 4), AXIS, "rotat")
    with pytest.raises(ValueError, match=r"'rotate'.*rounds='rotations', not 'matchings'"):
        Exchange(replace(roomy(2, 4, 3, 4), shifts=()), AXIS)
