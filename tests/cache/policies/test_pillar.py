"""Pillar against a loop of its rule: what a full step saw decides what is read until the next."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cache.policies import Pillar
from jaxllm.cache.policies.base import PolicyState, Seen, Selection
from jaxllm.cache.view import View
from jaxllm.config import ConfigError
from tests.cache.policies.stream import Stream, jitted, probabilities
from tests.cache.policies.views import layout

POLICY = Pillar(budget=0.25, least=5, period=5)
QUERY = jnp.zeros((2, 1, 4, 8))


def select(policy: Pillar, state: PolicyState, view: View) -> Selection:
    return jitted(policy, "select")(state, QUERY[: len(view.slots)], view)


class Row:
    """The rule for one row."""

    def __init__(self, policy: Pillar):
        self.policy, self.next, self.since = policy, 0, 0
        self.listed: list[list[int]] = [[], []]

    def due(self, length: int) -> bool:
        return length >= self.next

    def reads(self, head: int, sealed: int) -> list[int]:
        return sorted([*self.listed[head], *range(self.since, sealed)])

    def full(self, q: np.ndarray, k: np.ndarray, sealed: int, scale: float) -> None:
        """A full step of queries q [T, H, d], the last tokens of k [K, n, d]."""
        n, budget = k.shape[1], self.policy.budget
        mean = np.zeros(k.shape[:2])
        for t in range(len(q)):
            p = probabilities(q[t], k[:, : n - len(q) + t + 1], scale)
            mean[:, : p.shape[1]] += p.reshape(len(k), -1, p.shape[1]).mean(axis=1) / len(q)
        wanted = budget if isinstance(budget, int) else math.ceil(budget * n)
        count = max(min(n, max(self.policy.least, wanted)) - (n - sealed), 0)
        self.listed = [list(np.argsort(-head[:sealed], kind="stable")[:count]) for head in mean]
        self.since, self.next = sealed, n + self.policy.period


@pytest.mark.parametrize(
    ("budget", "least", "period", "tail"), [(0.25, 5, 5, 4), (0.5, 1, 3, 9), (6, 2, 4, 9), (1.0, 1, 6, 4)]
)
@given(seed=st.integers(0, 2**16), prompts=st.lists(st.integers(1, 9), min_size=2, max_size=2))
def test_every_row_reads_what_the_rule_says(
    budget: int | float, least: int, period: int, tail: int, seed: int, prompts: list[int]
):
    """Through several periods, rows in their own phases, pages sealed late and in any place of the pool."""
    policy = Pillar(budget=budget, least=least, period=period)
    rng = np.random.default_rng(seed)
    stream = Stream(layout(tail=tail), 2, rng)
    state, rows = policy.init(stream.sizes), [Row(policy), Row(policy)]
    _, seen = stream.append(prompts, width=9)
    state = jitted(policy, "observe")(state, stream.view(), seen._replace(mass=None))
    sealed = [n // 4 * 4 for n in prompts]
    for _ in range(15):
        q, seen = stream.append([1, 1])
        view = stream.view(sealed=sealed)
        due = np.asarray(jitted(policy, "due")(state, view))
        np.testing.assert_array_equal(due, [r.due(n) for r, n in zip(rows, stream.lengths)])
        logical, count = map(np.asarray, select(policy, state, view))
        for row in np.flatnonzero(~due):
            for head in range(2):
                numbers = logical[row, head, : count[row, head]]
                assert list(np.sort(numbers)) == rows[row].reads(head, sealed[row])
                assert len(set(numbers)) == len(numbers) and np.all(numbers < sealed[row])
                assert np.all(logical[row, head, count[row, head] :] == -1)
                if budget == 1.0:
                    assert len(numbers) == sealed[row]
        # Full pages are sealed after attention, or later, but before the tail overflows.
        for row, length in enumerate(stream.lengths):
            if rng.random() < 0.5 or length - sealed[row] == tail:
                sealed[row] = length // 4 * 4
        # What other rows' masses are is nobody's business.
        mass = jnp.where(due[:, None, None], seen.mass, jnp.nan)
        before = state
        state = jitted(policy, "observe")(state, stream.view(sealed=sealed), seen._replace(mass=mass))
        for row in range(2):
            if due[row]:
                rows[row].full(q[row], stream.k[row], sealed[row], stream.sizes.scale)
            else:
                for name, values in state.per_slot.items():
                    np.testing.assert_array_equal(values[row], before.per_slot[name][row])


def test_several_queries_are_averaged(rng: np.random.Generator):
    policy = Pillar(budget=0.7, least=5)
    stream = Stream(layout(tail=9, group=3), 2, rng)
    stream.append([12, 9])
    q, seen = stream.append([3, 2])
    state = jitted(policy, "observe")(policy.init(stream.sizes), stream.view(sealed=[8, 8]), seen)
    for row, new in enumerate([3, 2]):
        rule = Row(policy)
        rule.full(q[row, :new], stream.k[row], 8, stream.sizes.scale)
        count = int(state.per_slot["count"][row])
        assert count == len(rule.listed[0]) > 3
        for head in range(2):
            chosen = np.asarray(state.per_slot["chosen"])[row, head]
            assert sorted(chosen[:count] - 1) == sorted(rule.listed[head])
            assert not np.any(chosen[count:])


def test_a_new_request_and_a_long_addition_begin_with_a_full_step(rng: np.random.Generator):
    stream = Stream(layout(), 2, rng)
    stream.append([6, 6])
    _, seen = stream.append([1, 1])
    due, view = jitted(POLICY, "due"), stream.view(sealed=[4, 4])
    fresh = POLICY.init(stream.sizes)
    np.testing.assert_array_equal(due(fresh, view), [True, True])
    state = jitted(POLICY, "observe")(fresh, view, seen)
    np.testing.assert_array_equal(due(state, view), [False, False])
    zeroed = jax.tree.map(lambda pool: pool.at[0].set(0), state)
    np.testing.assert_array_equal(due(zeroed, view), [True, False])
    stream.append([4, 5])
    np.testing.assert_array_equal(due(state, stream.view()), [False, True])


def test_padded_rows_are_never_due_and_leave_no_trace(rng: np.random.Generator):
    stream = Stream(layout(), 2, rng)
    stream.append([6, 6])
    _, seen = stream.append([1, 1])
    fresh, view = POLICY.init(stream.sizes), stream.view(sealed=[4, 4])
    nowhere = replace(view, slots=jnp.full(2, stream.sizes.slots))
    np.testing.assert_array_equal(jitted(POLICY, "due")(fresh, nowhere), [False, False])
    observe = jitted(POLICY, "observe")
    jax.tree.map(np.testing.assert_array_equal, observe(fresh, nowhere, seen), fresh)
    idle = seen._replace(q_tokens=jnp.full((2, 1), -1))
    jax.tree.map(np.testing.assert_array_equal, observe(fresh, view, idle), fresh)


def test_rows_and_pages_in_another_order_choose_alike(rng: np.random.Generator):
    stream = Stream(layout(), 2, rng)
    stream.append([11, 17])
    _, seen = stream.append([1, 1])
    first = stream.view(sealed=[8, 16])
    state = jitted(POLICY, "observe")(POLICY.init(stream.sizes), first, seen)
    again = stream.view(sealed=[8, 16])
    assert np.any(again.table != first.table)
    swap = jax.tree.map(lambda x: x[::-1], (again.slots, again.table, again.sealed, again.tail_len))
    slots, table, sealed, tail_len = swap
    swapped = replace(
        again,
        slots=slots,
        table=table,
        sealed=sealed,
        tail_len=tail_len,
        tail_k=again.tail_k[::-1],
        tail_v=again.tail_v[::-1],
    )
    turned = jitted(POLICY, "observe")(POLICY.init(stream.sizes), swapped, Seen(*(x[::-1] for x in seen)))
    jax.tree.map(np.testing.assert_array_equal, turned, state)
    one, two = select(POLICY, state, first), select(POLICY, state, swapped)
    np.testing.assert_array_equal(one.logical[::-1], two.logical)


def test_what_a_row_reads_can_be_counted(rng: np.random.Generator):
    """As the docstring says: one step of everything, then the budget and what came since."""
    stream = Stream(layout(), 1, rng)
    stream.append([15])
    state = POLICY.init(stream.sizes)
    read = []
    for _ in range(6):
        sealed = [stream.lengths[0] // 4 * 4]
        _, seen = stream.append([1])
        view = stream.view(sealed=sealed)
        if bool(jitted(POLICY, "due")(state, view)[0]):
            read.append(int(view.length[0]))
        else:
            read.append(int(select(POLICY, state, view).count[0, 0] + view.tail_len[0]))
        state = jitted(POLICY, "observe")(state, view, seen)
    # 16 stored, 12 sealed: a quarter is 4, at least 5, of which 4 are the tail; each step adds one.
    assert read == [16, 6, 7, 8, 9, 21]


def test_the_list_has_room_for_the_budget_of_a_full_slot():
    sizes = layout(pages=2048, pages_per_slot=2048, page=4, tail=9)
    for policy, room in ((Pillar(), 411), (Pillar(budget=700), 700), (Pillar(budget=1.0), 8192)):
        made = jax.eval_shape(lambda policy=policy: policy.init(sizes))
        assert made.per_slot["chosen"].shape == (3, 2, room)


@pytest.mark.parametrize(
    ("field", "value"), [("budget", 0), ("budget", 0.0), ("budget", 1.5), ("least", 0), ("period", 0)]
)
def test_bad_settings_are_refused_by_name(field: str, value: Any):
    with pytest.raises(ConfigError, match=f"policy.{field}"):
        Pillar(**{field: value})
