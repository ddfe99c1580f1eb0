"""Attention over workers equals attention on one device: outputs, log-sum-exp and gradients, one program for all plans."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from pallas_kernels.attention import attention
from parallel.context import (
    STRATEGIES,
    Exchange,
    context_attention,
    from_slots,
    own,
    plan_specs,
    to_slots,
)
from tests.parallel.eight_devices.common import AXIS, batches, packed, roomy, workers

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@dataclass(frozen=True)
class Case:
    """Workers and shapes; ``tokens`` of a batch fit; ``window`` is the layer's, ``plan_window`` the plan's."""

    workers: int
    block: int
    slots: int
    stage_rounds: int
    tokens: int
    heads: tuple[int, int, int]
    window: int | None = None
    soft_cap: float | None = None
    backend: str = "rotate"
    plan_window: int | None = None

    @property
    def capacity(self):
        return roomy(self.workers, self.block, self.slots, self.stage_rounds, self.plan_window)

    @property
    def options(self):
        return {"window": self.window, "soft_cap": self.soft_cap}


FAST = [
    Case(8, 4, 6, 24, 110, (4, 2, 8)),
    # The last key of a block is the first that its window shows to the first query of the next but one.
    Case(5, 3, 6, 10, 50, (2, 2, 4), window=5, plan_window=8),
    Case(2, 8, 4, 2, 44, (4, 1, 8), soft_cap=3.0),
    Case(1, 4, 12, 4, 36, (2, 1, 4), window=3),
]
SLOW = [
    Case(6, 2, 7, 16, 50, (4, 2, 4), window=9, soft_cap=2.0),
    Case(7, 1, 9, 56, 40, (2, 1, 8)),
    Case(8, 8, 6, 12, 180, (8, 1, 8), window=20, plan_window=20, backend="allgather"),
]
NIGHTLY = [
    Case(3, 5, 6, 4, 60, (6, 3, 8), window=1, plan_window=1),
    Case(4, 16, 5, 6, 200, (4, 4, 16), soft_cap=20.0),
    Case(8, 8, 6, 12, 180, (8, 1, 8), window=20, plan_window=20),
    Case(8, 4, 6, 12, 110, (4, 2, 8), backend="allgather"),
]


def outputs_and_gradients(attend):
    """Of (q, k, v) and cotangents of both outputs: output, lse, dq, dk, dv."""

    def both(qkv, cotangents):
        made, back = jax.vjp(lambda qkv: attend(*qkv), qkv)
        return *made, *back(cotangents)[0]

    return both


@cache
def program(case: Case):
    """Outputs and gradients of packed tokens [T, ...] by all workers, reshuffled into slots and back."""
    exchange = Exchange(case.capacity, AXIS, case.backend)

    def attend(q, k, v, plan, places):
        q, k, v, plan, places = (own(x) for x in (q, k, v, plan, places))
        made = context_attention(q, k, v, plan, places, exchange, return_lse=True, **case.options)
        return tuple(x[None] for x in made)

    each = PartitionSpec(AXIS)
    over = jax.shard_map(
        attend,
        mesh=workers(case.workers),
        in_specs=(each, each, each, *plan_specs(AXIS)),
        out_specs=each,
        check_vma=False,
    )

    def step(qkv, cotangents, plan, places):
        def whole(*qkv):
            slots = (to_slots(x, places.index) for x in qkv)
            return tuple(from_slots(x, places.index, case.tokens) for x in over(*slots, plan, places))

        return outputs_and_gradients(whole)(qkv, cotangents)

    return jax.jit(step)


@cache
def reference(case: Case):
    """The same of one device, every document apart by its mask."""

    def step(qkv, cotangents, segment_ids, positions):
        def whole(q, k, v):
            places = {"positions": positions[None], "segment_ids": segment_ids[None]}
            marks = {f"{side}_{name}": x for side in ("q", "kv") for name, x in places.items()}
            made = attention(
                q[None],
                k[None],
                v[None],
                **marks,
                **case.options,
                return_lse=True,
                implementation="reference",
            )
            return made[0][0], jnp.where(segment_ids[:, None] > 0, made[1][0], 0)

        return outputs_and_gradients(whole)(qkv, cotangents)

    return jax.jit(step)


def draw(case: Case, seed: int):
    """Queries, keys, values and cotangents of as many tokens as fit; those behind the batch stand for padding."""
    rng = np.random.default_rng(seed)
    H, K, d = case.heads
    make = partial(rng.standard_normal, dtype=np.float32)
    qkv = tuple(make((case.tokens, heads, d)) for heads in (H, K, K))
    return qkv, (make((case.tokens, H, d)), make((case.tokens, H)))


def places_of(lengths, tokens):
    """segment_ids and positions of packed documents, padded."""
    segment_ids, positions = np.zeros((2, tokens), np.int32)
    segment_ids[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    positions[: sum(lengths)] = np.concatenate([np.arange(n) for n in lengths])
    return segment_ids, positions


def compare(case: Case, lengths, seed: int):
    """Every strategy, in the same program."""
    qkv, cotangents = draw(case, seed)
    n = sum(lengths)
    # Behind the batch nothing is seen and nothing flows back.
    cotangents = tuple(
        np.where(np.arange(case.tokens)[(...,) + (None,) * (x.ndim - 1)] < n, x, 0) for x in cotangents
    )
    expected = reference(case)(qkv, cotangents, *places_of(lengths, case.tokens))
    for strategy in STRATEGIES:
        batch = packed(lengths, case.capacity, strategy)
        found = program(case)(qkv, cotangents, batch.plan.arrays, batch.places)
        for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), found, expected):
            np.testing.assert_allclose(one, other, err_msg=f"{strategy} {name} {lengths}", **TOLERANCE)


def check(case: Case, examples: int):
    @settings(max_examples=examples)
    @example([case.tokens], 0)
    @example([case.block] * (case.tokens // case.block), 1)
    @example([1] * min(case.tokens, 9), 2)
    @given(batches(case.tokens, case.block), st.integers(0, 2**31))
    def run(lengths, seed):
        compare(case, lengths, seed)

    run()
    # Plans of 5 strategies for each batch, compiled once.
    assert program(case)._cache_size() == 1


@pytest.mark.parametrize("case", FAST, ids=str)
def test_equals_one_device(case):
    check(case, 6)


@pytest.mark.parametrize("window", [None, 9])
def test_a_layer_that_sees_more_than_the_plan_is_refused(window):
    case = Case(2, 4, 4, 2, 20, (2, 1, 4), window=window, plan_window=8)
    with pytest.raises(ValueError, match=f"window={window}: must be at most 8"):
        compare(case, [20], 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_equals_one_device_at_length(case):
    check(case, 40)


@pytest.mark.nightly
@pytest.mark.parametrize("case", NIGHTLY, ids=str)
def test_equals_one_device_in_every_shape(case):
    check(case, 40)
