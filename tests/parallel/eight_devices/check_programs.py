"""What compiled programs of context parallelism hold: collectives, bytes, overlap and memory; and Ulysses."""

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.attention import attention
from parallel.context import (
    Exchange,
    PlanConfig,
    compiled_bytes,
    context_attention,
    layout,
    make_plan,
    own,
    plan_specs,
    planned_bytes,
    shares,
    ulysses_attention,
    ulysses_plan,
)
from tests.parallel.eight_devices.common import AXIS, Packed, workers

LENGTHS = [300, 20, 9, 120, 64, 7]
HEADS = 4, 2, 8


@cache
def batch(count: int) -> Packed:
    config = PlanConfig(count, 16, rounds="rotations", stage_rounds=4)
    return Packed(make_plan(LENGTHS, config), tuple(LENGTHS))


def arguments(plan, places):
    capacity, (H, K, d) = plan.capacity, HEADS
    slots = places.index.shape[:2]
    shapes = [(*slots, capacity.block, heads, d) for heads in (H, K, K, H)]
    return [np.ones(shape, np.float32) for shape in shapes]


def attend(one: Packed, backend: str = "rotate"):
    """(q, k, v, plan, places) to the output, all over workers."""
    capacity = one.plan.capacity
    exchange = Exchange(capacity, AXIS, backend)

    def run(*given):
        return context_attention(*(own(x) for x in given), exchange)[None]

    each = PartitionSpec(AXIS)
    specs = each, each, each, *plan_specs(AXIS)
    return jax.shard_map(run, mesh=workers(capacity.workers), in_specs=specs, out_specs=each, check_vma=False)


def with_gradients(one: Packed, backend: str = "rotate"):
    run = attend(one, backend)

    def both(q, k, v, dout, plan, places):
        out, back = jax.vjp(lambda *qkv: run(*qkv, plan, places), q, k, v)
        return out, back(dout)

    return both


@cache
def compiled(one: Packed, backend: str = "rotate"):
    given = *arguments(one.plan, one.places), one.plan.arrays, one.places
    return jax.jit(with_gradients(one, backend)).lower(*given).compile()


def test_rotations_gather_nothing_and_send_what_the_capacity_says():
    one, (_, K, d) = batch(8), HEADS
    assert one.plan.balance.transfers > 30 and one.plan.capacity.stages > 2
    kv = 2 * one.plan.capacity.block * K * d * 4
    found = compiled_bytes(compiled(batch(8)).as_text(), 8)
    # Keys and values in forward and again in backward, and their gradients, all in float32.
    expected = 3 * planned_bytes(one.plan, kv, "rotate")
    assert set(found) == {"collective-permute"}
    assert (expected == found["collective-permute"]).all()
    exact = planned_bytes(one.plan, kv, "ragged")
    assert exact.sum() == one.plan.balance.transfers * kv
    assert (exact <= planned_bytes(one.plan, kv, "rotate")).all()


def test_gathering_sends_everything_to_everybody():
    one, (_, K, d) = batch(8), HEADS
    kv = 2 * one.plan.capacity.block * K * d * 4
    text = compiled(batch(8), "allgather").as_text()
    found = compiled_bytes(text, 8)
    whole = int(planned_bytes(one.plan, kv, "allgather")[0])
    # Once, or once for each use, as the compiler likes.
    assert found["all-gather"] >= whole and found["all-gather"] % whole == 0
    assert "collective-permute" not in found


def _steps(jaxpr, found):
    """Every program of a jaxpr that has both loops and permutations."""
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    if {"while", "ppermute"} <= names:
        found.append(jaxpr)
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for each in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    _steps(inner, found)
    return found


def _needs(jaxpr):
    """For each equation, by number, the equations that it needs, directly or not."""
    made, needs = {}, []
    for number, eqn in enumerate(jaxpr.eqns):
        own_needs = set()
        for var in eqn.invars:
            if not hasattr(var, "val") and var in made:
                own_needs |= {made[var]} | needs[made[var]]
        needs.append(own_needs)
        made.update(dict.fromkeys(eqn.outvars, number))
    return needs


def test_each_stage_travels_while_the_one_before_is_computed():
    one = batch(8)
    given = *arguments(one.plan, one.places), one.plan.arrays, one.places
    programs = _steps(jax.make_jaxpr(with_gradients(one))(*given).jaxpr, [])
    stages = one.plan.capacity.stages
    assert len(programs) == 2
    for program, returned in zip(programs, (False, True)):
        needs = _needs(program)
        names = [eqn.primitive.name for eqn in program.eqns]
        loops = [n for n, name in enumerate(names) if name == "while"]
        assert len(loops) == stages + 1
        fetched, given_back = set(), set()
        for send in (n for n, name in enumerate(names) if name == "ppermute"):
            before = [t for t, loop in enumerate(loops) if loop in needs[send]]
            after = [t for t, loop in enumerate(loops) if send in needs[loop]]
            assert before == list(range(len(before))) and after == list(
                range(len(loops) - len(after), len(loops))
            )
            if after and after[0] == len(before) + 1:
                # Keys of a stage: while the one before is computed, but not before the one before that is done.
                fetched.add(after[0])
            else:
                # Gradients of the last of ``before``: two more are computed while they travel.
                assert not after or after[0] == len(before) + 2
                given_back.add(before[-1])
        assert fetched == set(range(1, stages + 1))
        assert given_back == (fetched if returned else set())


def test_memory_of_a_worker_does_not_grow_with_stages():
    plan = batch(8).plan
    doubled = tuple(2 * count for count in plan.capacity.shifts)
    stages = -(-sum(doubled) // plan.capacity.stage_rounds)
    capacity = replace(plan.capacity, shifts=doubled, stages=stages)
    config = PlanConfig(8, 16, rounds="rotations", stage_rounds=4)
    wide = Packed(make_plan(LENGTHS, config, at_least=capacity), tuple(LENGTHS))
    more = stages - plan.capacity.stages
    assert wide.plan.capacity == capacity and more >= 6
    stage_bytes = capacity.stage_rounds * 2 * capacity.block * HEADS[1] * HEADS[2] * 4
    growth = (
        compiled(wide).memory_analysis().temp_size_in_bytes
        - compiled(batch(8)).memory_analysis().temp_size_in_bytes
    )
    assert growth < more * stage_bytes / 2


def test_memory_of_a_worker_falls_as_workers_grow():
    sizes = []
    for count in (1, 2, 4, 8):
        stats = compiled(batch(count)).memory_analysis()
        sizes.append(stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes)
    assert all(later < earlier for earlier, later in pairwise(sizes)), sizes
    assert sizes[-1] < sizes[0] / 2, sizes


@pytest.mark.parametrize("count", [2, 4])
def test_ulysses_equals_one_device(count, seed):
    H, K, d = 8, 4, 8
    lengths = [30, 3, 11, 1, 7]
    plan = ulysses_plan(lengths, count, block=8)
    one = Packed(plan, tuple(lengths))
    assert plan.capacity.slots % count == 0
    places = shares(layout(plan), count)
    exchange = Exchange(plan.capacity, AXIS)
    rng = np.random.default_rng(seed)
    qkv = [rng.standard_normal((one.tokens, heads, d)).astype(np.float32) for heads in (H, K, K)]
    dout = rng.standard_normal(qkv[0].shape).astype(np.float32)
    index = places.index

    def run(q, k, v, plan, places):
        made = ulysses_attention(
            q[0], k[0], v[0], own(plan), own(places), exchange, window=9, return_lse=True
        )
        return tuple(x[None] for x in made)

    each, whole = PartitionSpec(AXIS), PartitionSpec()
    specs = each, each, each, whole, plan_specs(AXIS)[1]
    over = jax.shard_map(run, mesh=workers(count), in_specs=specs, out_specs=each, check_vma=False)

    def shared(x):
        return x[np.maximum(index, 0)] * (index >= 0).reshape(*index.shape, *[1] * (x.ndim - 1))

    @jax.jit
    def step(qkv, dout):
        (out, lse), back = jax.vjp(lambda *qkv: over(*map(shared, qkv), plan.arrays, places), *qkv)
        return out, lse, *back((shared(dout), jnp.zeros_like(lse)))

    segment_ids = jnp.asarray(np.repeat(np.arange(len(lengths)) + 1, lengths)[None])
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None])
    marks = {"q_positions": positions, "kv_positions": positions}
    marks |= {"q_segment_ids": segment_ids, "kv_segment_ids": segment_ids}

    @jax.jit
    def alone(qkv, dout):
        call = partial(attention, **marks, window=9, return_lse=True, implementation="reference")
        (out, lse), back = jax.vjp(lambda *qkv: call(*(x[None] for x in qkv)), *qkv)
        return out[0], lse[0], *back((dout[None], jnp.zeros_like(lse)))

    def tokenwise(x):
        made = np.zeros((one.tokens, *x.shape[3:]), np.float32)
        made[index[index >= 0]] = np.asarray(x)[index >= 0]
        return made

    out, lse, *grads = step(qkv, dout)
    for found, expected in zip((tokenwise(out), tokenwise(lse), *grads), alone(qkv, dout)):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def _ulysses(heads):
    plan = ulysses_plan([30], 2, block=8)
    places = shares(layout(plan), 2)
    exchange = Exchange(plan.capacity, AXIS)

    def run(q, k, plan, places):
        return ulysses_attention(q[0], k[0], k[0], own(plan), own(places), exchange)[None]

    each = PartitionSpec(AXIS)
    specs = each, each, PartitionSpec(), plan_specs(AXIS)[1]
    q, k = (np.ones((*places.index.shape, h, 4), np.float32) for h in heads)
    over = jax.shard_map(run, mesh=workers(2), in_specs=specs, out_specs=each, check_vma=False)
    return over(q, k, plan.arrays, places)


def _attend(count: int, change=lambda given: given):
    one = batch(8)
    exchange = Exchange(one.plan.capacity, AXIS)
    given = change([*arguments(one.plan, one.places)[:3], one.plan.arrays, one.places])
    return jax.shard_map(
        lambda *given: context_attention(*(own(x) for x in given), exchange)[None],
        mesh=workers(count),
        in_specs=(*[PartitionSpec(AXIS)] * 3, *plan_specs(AXIS)),
        out_specs=PartitionSpec(AXIS),
        check_vma=False,
    )(*given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _ulysses((4, 1)), "1 key heads on 2 workers: must be a multiple"),
        (lambda: _ulysses((3, 3)), "3 query heads on 2 workers: must be a multiple"),
        (
            lambda: _attend(8, lambda given: [*(x[:, :1] for x in given[:3]), *given[3:]]),
            r"q.shape=\(1, 16, 4, 8\): must begin with slots=5",
        ),
        (lambda: _attend(4), "capacity workers=8: must be the 4 of axis 'context'"),
    ],
)
def test_errors_name_what_was_given(call, words):
    with pytest.raises(ValueError, match=words):
        call()
