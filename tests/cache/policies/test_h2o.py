"""H2O's scores are those of a plain loop of full attention, before and after evictions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cache.policies import H2O
from jaxllm.cache.policies.mass import column_mass
from jaxllm.config import ConfigError
from tests.cache.policies.stream import Stream, jitted, probabilities
from tests.cache.policies.views import layout

POLICY = H2O(heavy=5, recent=4, buffer=4)


class Loop:
    """The scores of one row, token by token: f64[K, n] of what is stored."""

    def __init__(self, heads: int):
        self.scores = np.zeros((heads, 0))

    def step(self, q: np.ndarray, k: np.ndarray, scale: float) -> None:
        """One token more: q [H, d] over all stored keys k [K, n, d], its own the last."""
        p = probabilities(q, k, scale)
        self.scores = np.pad(self.scores, ((0, 0), (0, 1))) + p.reshape(len(k), -1, k.shape[1]).mean(axis=1)

    def evict(self, heavy: int, recent: int) -> np.ndarray:
        """i64[K, heavy + recent]: what stays."""
        n = self.scores.shape[1]
        kept = []
        for head in self.scores:
            best = np.argsort(-head[: n - recent], kind="stable")[:heavy]
            kept.append(np.sort([*best, *range(n - recent, n)]))
        self.scores = np.take_along_axis(self.scores, np.stack(kept), axis=1)
        return np.stack(kept)


@given(seed=st.integers(0, 2**16), chunks=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_a_prefill_in_any_chunks_is_scored_like_a_loop(seed: int, chunks: list[int]):
    stream = Stream(layout(), 2, np.random.default_rng(seed))
    state, loops = POLICY.init(stream.sizes), [Loop(2), Loop(2)]
    for n in chunks:
        new = [n, 9 - n]
        q, seen = stream.append(new, width=9)
        state = jitted(POLICY, "observe")(state, stream.view(), seen._replace(mass=None))
        for row in range(2):
            for t in range(new[row]):
                end = stream.lengths[row] - new[row] + t + 1
                loops[row].step(q[row, t], stream.k[row][:, :end], stream.sizes.scale)
    for row in range(2):
        n = stream.lengths[row]
        mass = np.asarray(state.per_slot["mass"])
        np.testing.assert_allclose(mass[row, :, :n], loops[row].scores, rtol=2e-5, atol=1e-6)
        assert not np.any(mass[row, :, n:])
    assert not np.any(mass[2])


@pytest.mark.parametrize("block", [1, 4, 32])
def test_blocks_of_queries_do_not_show(rng: np.random.Generator, block: int):
    stream = Stream(layout(group=3), 2, rng)
    _, seen = stream.append([11, 6])
    found = jax.jit(column_mass, static_argnums=2)(stream.view(), seen, block)
    wanted = np.nan_to_num(seen.mass) * np.asarray([11, 6])[:, None, None]
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=2), [[11] * 2, [6] * 2], rtol=1e-5)


def test_a_long_stream_is_evicted_like_the_loop(rng: np.random.Generator):
    """Decoding in two phases, over many evictions: scores move with their tokens."""
    stream = Stream(layout(), 2, rng)
    state, loops = POLICY.init(stream.sizes), [Loop(2), Loop(2)]
    observe, triggers, maintain = (jitted(POLICY, verb) for verb in ("observe", "triggers", "maintain"))
    evictions = 0
    for step in range(30):
        first = step == 0
        new = [3, 14] if first else [1, 1]
        q, seen = stream.append(new)
        state = observe(state, stream.view(), seen._replace(mass=None) if first else seen)
        for row in range(2):
            for t in range(new[row]):
                end = stream.lengths[row] - new[row] + t + 1
                loops[row].step(q[row, t], stream.k[row][:, :end], stream.sizes.scale)
        rows = np.asarray(triggers(state, stream.view(), jnp.full(2, first)))
        np.testing.assert_array_equal(rows, [n >= 13 or (first and n > 9) for n in stream.lengths])
        before = state
        if rows.any():
            state, keep = maintain(state, stream.view(), jnp.asarray(rows))
            stream.evict(keep, rows)
            np.testing.assert_array_equal(np.asarray(keep.count)[rows], 9)
        for row in range(2):
            mass, n = np.asarray(state.per_slot["mass"])[row], stream.lengths[row]
            if rows[row]:
                evictions += 1
                kept = loops[row].evict(5, 4)
                np.testing.assert_array_equal(np.asarray(keep.tokens)[row], kept)
                assert np.all(np.diff(stream.ids[row]) > 0)
            else:
                np.testing.assert_array_equal(mass, np.asarray(before.per_slot["mass"])[row])
            np.testing.assert_allclose(mass[:, :n], loops[row].scores, rtol=5e-5, atol=1e-6)
            assert not np.any(mass[:, n:])
            assert n <= POLICY.stored([3, 14][row], step) <= 13
    assert evictions == 5 + 8


def test_a_decode_step_of_several_queries_adds_each(rng: np.random.Generator):
    """Mass comes as a mean over live queries; what is added is their sum."""
    stream = Stream(layout(), 2, rng)
    _, seen = stream.append([6, 2])
    by_mass, by_lse = (
        jitted(POLICY, "observe")(POLICY.init(stream.sizes), stream.view(), s)
        for s in (seen, seen._replace(mass=None))
    )
    np.testing.assert_allclose(by_mass.per_slot["mass"], by_lse.per_slot["mass"], rtol=2e-5, atol=1e-6)


def test_padded_rows_leave_no_trace(rng: np.random.Generator):
    stream = Stream(layout(), 2, rng)
    _, seen = stream.append([6, 2])
    state = jitted(POLICY, "observe")(POLICY.init(stream.sizes), stream.view(), seen._replace(mass=None))
    nowhere = replace(stream.view(), slots=jnp.full(2, 3))
    for s in (seen, seen._replace(mass=None)):
        after = jitted(POLICY, "observe")(state, nowhere, s)
        jax.tree.map(np.testing.assert_array_equal, after, state)
    idle = seen._replace(q_tokens=jnp.full((2, 6), -1), mass=jnp.full((2, 2, 28), jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, jitted(POLICY, "observe")(state, stream.view(), idle), state)


def test_a_view_of_fewer_pages_reads_the_same_scores(rng: np.random.Generator):
    """A step may bound how far it reads; scores past the bound are those of no stored token."""
    stream = Stream(layout(), 2, rng)
    _, seen = stream.append([14, 10])
    wide = stream.view()
    narrow = replace(wide, table=wide.table[:, :4])
    states = [
        jitted(POLICY, "observe")(POLICY.init(stream.sizes), v, seen._replace(mass=None))
        for v in (wide, narrow)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *states)
    kept = [jitted(POLICY, "maintain")(s, v, jnp.ones(2, bool)) for s, v in zip(states, (wide, narrow))]
    np.testing.assert_array_equal(kept[0][1].tokens, kept[1][1].tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), kept[0][0], kept[1][0])


def test_what_fits_the_budget_stays(rng: np.random.Generator):
    stream = Stream(layout(), 3, rng)
    _, seen = stream.append([10, 9, 5], width=14)
    state = jitted(POLICY, "observe")(POLICY.init(stream.sizes), stream.view(), seen._replace(mass=None))
    triggers = jitted(POLICY, "triggers")
    np.testing.assert_array_equal(triggers(state, stream.view(), jnp.ones(3, bool)), [True, False, False])
    np.testing.assert_array_equal(triggers(state, stream.view(), jnp.zeros(3, bool)), [False] * 3)
    after, keep = jitted(POLICY, "maintain")(state, stream.view(), jnp.ones(3, bool))
    np.testing.assert_array_equal(keep.count, [9, 9, 5])
    for row in (1, 2):
        np.testing.assert_array_equal(after.per_slot["mass"][row], state.per_slot["mass"][row])


@pytest.mark.parametrize(("prompt", "new", "most"), [(3, 2, 5), (9, 3, 12), (100, 2, 11), (100, 99, 13)])
def test_what_a_request_stores_is_bounded(prompt: int, new: int, most: int):
    assert POLICY.stored(prompt, new) == most


@pytest.mark.parametrize("field", ["heavy", "recent", "buffer"])
def test_bad_settings_are_refused_by_name(field: str):
    with pytest.raises(ConfigError, match=f"policy.{field}"):
        H2O(**{field: 0})
