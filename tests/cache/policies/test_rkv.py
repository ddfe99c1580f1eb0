"""R-KV against loops written from the paper's code semantics, and the properties that a faithful one shows."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cache.policies import RKV
from jaxllm.cache.policies.base import PolicyState, Seen
from jaxllm.cache.policies.rkv import importance, redundancy
from jaxllm.config import ConfigError
from tests.cache.policies.stream import Stream, jitted
from tests.cache.policies.views import layout

POLICY = RKV(budget=9, buffer=8, window=3, kernel=3, threshold=0.2, mix=0.3)


def looked_at(q: np.ndarray, k: np.ndarray, scale: float, kernel: int) -> np.ndarray:
    """f64[n - w]: importance of one KV head's candidates; q [G, w, d], k [n, d]."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    w = q.shape[1]
    candidates = len(k) - w
    mean = np.zeros(candidates)
    for j in range(w):
        logits = np.asarray([max(scale * (q[g, j] @ k[i]) for g in range(len(q))) for i in range(candidates)])
        weights = np.exp(logits - logits.max())
        mean += weights / weights.sum() / w
    half = kernel // 2
    return np.asarray([mean[max(i - half, 0) : i + half + 1].max() for i in range(candidates)])


def repeated(k: np.ndarray, threshold: float) -> np.ndarray:
    """f64[n]: redundancy of one KV head's stored keys k [n, d]."""
    k = k.astype(np.float64)
    unit = k / (np.linalg.norm(k, axis=1, keepdims=True) + 1e-8)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, 0)
    for i in range(len(k)):
        alike = [j for j in range(len(k)) if similarity[i, j] > threshold]
        similarity[i, max(alike, default=0)] = 0
    mean = similarity.mean(axis=0)
    return np.exp(mean) / np.exp(mean).sum()


def scored(policy: RKV, q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """f64[n - w]: what decides between one head's candidates."""
    first = looked_at(q, k, scale, policy.kernel)
    return policy.mix * first - (1 - policy.mix) * repeated(k, policy.threshold)[: len(first)]


def ring_queries(state: PolicyState, row: int, heads: int) -> np.ndarray:
    """[K, G, w, d] of a slot."""
    ring = np.asarray(state.per_slot["queries"])[row]
    return np.moveaxis(ring.reshape(len(ring), heads, -1, ring.shape[-1]), 0, 2)


def filled(policy: RKV, new: list[int], rng: np.random.Generator, **sizes: Any) -> tuple[Stream, PolicyState]:
    """A stream after one prefill of ``new`` tokens, observed."""
    stream = Stream(layout(**sizes), len(new), rng)
    state = policy.init(stream.sizes)
    _, seen = stream.append(new, width=stream.sizes.tokens)
    return stream, jitted(policy, "observe")(state, stream.view(), seen._replace(mass=None))


@pytest.mark.parametrize(("group", "mix", "kernel"), [(1, 0.1, 7), (2, 0.0, 3), (2, 0.5, 5), (3, 1.0, 1)])
@given(seed=st.integers(0, 2**16), lengths=st.lists(st.integers(10, 28), min_size=2, max_size=2))
def test_the_best_by_the_published_score_stay(
    seed: int, lengths: list[int], group: int, mix: float, kernel: int
):
    policy = replace(POLICY, mix=mix, kernel=kernel)
    stream, state = filled(policy, lengths, np.random.default_rng(seed), group=group)
    _, keep = jitted(policy, "maintain")(state, stream.view(), jnp.ones(2, bool))
    np.testing.assert_array_equal(keep.count, [9, 9])
    for row, n in enumerate(lengths):
        q = ring_queries(state, row, 2)
        for head in range(2):
            kept = np.asarray(keep.tokens)[row, head]
            assert np.all(np.diff(kept) > 0) and kept[0] >= 0
            np.testing.assert_array_equal(kept[-3:], np.arange(n - 3, n))
            scores = scored(policy, q[head], stream.k[row][head], stream.sizes.scale)
            dropped = np.delete(scores, kept[:-3])
            assert scores[kept[:-3]].min() >= dropped.max(initial=-np.inf) - 1e-6


def test_importance_and_redundancy_are_those_of_the_loops(rng: np.random.Generator):
    q = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    k = rng.normal(size=(2, 23, 8)).astype(np.float32)
    padded = np.pad(k, ((0, 0), (0, 6), (0, 0)))
    length = jnp.int32(23)
    found = jax.jit(importance, static_argnums=(3, 4))(q, padded, length, 0.7, 5)
    wanted = np.stack([looked_at(q[h], k[h], 0.7, 5) for h in range(2)])
    np.testing.assert_allclose(found[:, :19], wanted, rtol=1e-5)
    assert not np.any(found[:, 19:])
    for threshold, tile in ((0.0, 5), (0.3, 1), (0.3, 128), (0.9, 29)):
        wanted = np.stack([repeated(k[h], threshold) for h in range(2)])
        found = jax.jit(redundancy, static_argnums=(2, 3))(padded, length, threshold, tile)
        np.testing.assert_allclose(found[:, :23], wanted, rtol=1e-5)
        assert not np.any(found[:, 23:])


def test_redundancy_knows_directions_only(rng: np.random.Generator):
    found = jax.jit(redundancy, static_argnums=(2,))
    k = rng.normal(size=(2, 8, 8)).astype(np.float32)
    once, thrice = (found(x, jnp.int32(8), 0.3) for x in (k, 3 * k))
    np.testing.assert_allclose(once, thrice, rtol=1e-5)
    apart = np.tile(np.eye(8, dtype=np.float32), (2, 1, 1))
    np.testing.assert_allclose(found(apart, jnp.int32(8), 0.3), np.full((2, 8), 1 / 8), rtol=1e-6)


def test_of_repetitions_the_newest_stays(rng: np.random.Generator):
    """Four directions, said thrice each: with mix 0 one of each is left, the last."""
    policy = RKV(budget=8, buffer=8, window=4, kernel=1, mix=0.0)
    stream = Stream(layout(), 1, rng)
    said = np.concatenate([rng.permutation(4) for _ in range(3)])
    directions = np.eye(8)[np.concatenate([said, [4, 5, 6, 7]])] + 0.01 * rng.normal(size=(16, 8))
    stream.append([16], [np.broadcast_to(directions, (2, 16, 8))])
    _, keep = jitted(policy, "maintain")(policy.init(stream.sizes), stream.view(), jnp.ones(1, bool))
    np.testing.assert_array_equal(keep.tokens[0], [np.arange(8, 16)] * 2)


def test_mix_0_ignores_queries_and_mix_1_keys_alike(rng: np.random.Generator):
    stream, state = filled(POLICY, [24], rng)
    other = PolicyState(per_slot={"queries": 5 + state.per_slot["queries"][..., ::-1]})
    rows, seen = jnp.ones(1, bool), stream.view()
    kept = {
        (mix, i): np.asarray(jitted(replace(POLICY, mix=mix), "maintain")(s, seen, rows)[1].tokens)
        for mix in (0.0, 1.0)
        for i, s in enumerate((state, other))
    }
    np.testing.assert_array_equal(kept[0.0, 0], kept[0.0, 1])
    assert np.any(kept[1.0, 0] != kept[1.0, 1])
    blind = jitted(replace(POLICY, mix=1.0, threshold=0.9), "maintain")(state, seen, rows)[1].tokens
    np.testing.assert_array_equal(kept[1.0, 0], blind)


def test_a_group_of_equal_query_heads_is_one(rng: np.random.Generator):
    stream, state = filled(POLICY, [24], rng, group=1)
    twice = PolicyState(per_slot={"queries": jnp.repeat(state.per_slot["queries"], 2, axis=2)})
    seen, rows = stream.view(), jnp.ones(1, bool)
    one, two = (jitted(POLICY, "maintain")(s, seen, rows)[1] for s in (state, twice))
    np.testing.assert_array_equal(one.tokens, two.tokens)


def test_rows_are_independent(rng: np.random.Generator):
    stream, state = filled(POLICY, [20, 11, 25], rng)
    maintain = jitted(POLICY, "maintain")
    _, together = maintain(state, stream.view(), jnp.ones(3, bool))
    order = np.asarray([2, 0, 1])
    swapped = Stream(stream.sizes, 3, rng)
    swapped.k, swapped.v = ([x[i] for i in order] for x in (stream.k, stream.v))
    moved = PolicyState(per_slot={"queries": state.per_slot["queries"][order]})
    _, apart = maintain(moved, swapped.view(), jnp.asarray([True, False, True]))
    for row in (0, 2):
        np.testing.assert_array_equal(apart.tokens[row], together.tokens[order[row]])


def test_a_long_stream_stays_within_bounds_and_in_order(rng: np.random.Generator):
    """Five evictions and more, each against the loops over what was stored then."""
    stream = Stream(layout(), 2, rng)
    state = POLICY.init(stream.sizes)
    observe, triggers, maintain = (jitted(POLICY, verb) for verb in ("observe", "triggers", "maintain"))
    evictions = 0
    for step in range(54):
        # Row 1 has a long prompt and is out of phase; both grow by a token after it.
        _, seen = stream.append([1, 15] if step == 0 else [1, 1])
        state = observe(state, stream.view(), seen)
        rows = np.asarray(triggers(state, stream.view(), jnp.full(2, step == 0)))
        lengths = stream.lengths
        np.testing.assert_array_equal(rows, [n >= 17 or (step == 0 and n > 9) for n in lengths])
        if not rows.any():
            continue
        after, keep = maintain(state, stream.view(), jnp.asarray(rows))
        jax.tree.map(np.testing.assert_array_equal, after, state)
        before = [k.copy() for k in stream.k]
        stream.evict(keep, rows)
        for row in np.flatnonzero(rows):
            evictions += 1
            q = ring_queries(state, row, 2)
            for head in range(2):
                ids, n = stream.ids[row][head], lengths[row]
                assert len(ids) == 9 and np.all(np.diff(ids) > 0) and ids[-1] == stream.seen[row] - 1
                best = np.argsort(
                    -scored(POLICY, q[head], before[row][head], stream.sizes.scale), kind="stable"
                )
                kept = np.sort([*best[:6], n - 3, n - 2, n - 1])
                np.testing.assert_array_equal(np.asarray(keep.tokens)[row, head], kept)
        for row, (prompt, new) in enumerate([(1, step), (15, step)]):
            assert stream.lengths[row] <= POLICY.stored(prompt, new) <= 17
    assert evictions == 5 + 7


@pytest.mark.parametrize(("prompt", "new", "most"), [(3, 2, 5), (9, 8, 17), (100, 3, 12), (100, 99, 17)])
def test_what_a_request_stores_is_bounded(prompt: int, new: int, most: int):
    assert POLICY.stored(prompt, new) == most


def test_rows_below_the_budget_keep_everything(rng: np.random.Generator):
    stream, state = filled(POLICY, [9, 16], rng)
    never = jitted(POLICY, "triggers")(state, stream.view(), jnp.zeros(2, bool))
    np.testing.assert_array_equal(never, [False, False])
    np.testing.assert_array_equal(
        jitted(POLICY, "triggers")(state, stream.view(), jnp.ones(2, bool)), [False, True]
    )
    _, keep = jitted(POLICY, "maintain")(state, stream.view(), jnp.ones(2, bool))
    np.testing.assert_array_equal(keep.tokens[0], [np.arange(9)] * 2)
    stream, state = filled(POLICY, [5], rng)
    _, keep = jitted(POLICY, "maintain")(state, stream.view(), jnp.ones(1, bool))
    assert int(keep.count[0]) == 5
    np.testing.assert_array_equal(keep.tokens[0, :, :5], [np.arange(5)] * 2)


def test_the_ring_holds_the_last_queries_however_they_came(rng: np.random.Generator):
    """Chunks, padding and idle steps leave what one prefill leaves; rows without a slot leave nothing."""
    policy, sizes = replace(POLICY, window=4), layout()
    stream = Stream(sizes, 2, rng)
    state, past = policy.init(sizes), [np.zeros((0, 4, 8), np.float32)] * 2
    for new in ([7, 2], [1, 5], [0, 1], [1, 1], [0, 0], [6, 3]):
        q, seen = stream.append(new, width=7)
        past = [np.concatenate([p, q[row, : new[row]]]) for row, p in enumerate(past)]
        # In whatever order the queries of a step stand.
        backwards = Seen(*(x[:, ::-1] for x in seen[:4]), None)
        turned = jitted(policy, "observe")(state, stream.view(), backwards)
        state = jitted(policy, "observe")(state, stream.view(), seen._replace(mass=None))
        jax.tree.map(np.testing.assert_array_equal, turned, state)
        for row in range(2):
            assert np.all(np.isfinite(state.per_slot["queries"][row]))
            n = len(past[row])
            for at in range(max(n - 4, 0), n):
                np.testing.assert_array_equal(state.per_slot["queries"][row, at % 4], past[row][at])
    assert not np.any(state.per_slot["queries"][2])
    nowhere = replace(stream.view(), slots=jnp.full(2, sizes.slots))
    jax.tree.map(np.testing.assert_array_equal, jitted(policy, "observe")(state, nowhere, backwards), state)


def test_quantised_keys_are_scored_as_attention_multiplies_them(rng: np.random.Generator):
    stream, state = filled(POLICY, [24], rng)
    seen = stream.view(bits=4)
    _, keep = jitted(POLICY, "maintain")(state, seen, jnp.ones(1, bool))
    stream.k[0] = np.asarray(seen.keys())[0, :, :24]
    _, plain = jitted(POLICY, "maintain")(state, stream.view(), jnp.ones(1, bool))
    np.testing.assert_array_equal(keep.tokens, plain.tokens)


def test_similarities_never_exist_all_at_once():
    """The largest array in a compaction of a long cache is far below L x L of one head."""
    sizes = layout(pages=1024, pages_per_slot=1024)
    stream = Stream(sizes, 1, np.random.default_rng(0))
    seen = jax.eval_shape(lambda: stream.view())
    traced = jax.make_jaxpr(RKV().maintain)(RKV().init(sizes), seen, jnp.ones(1, bool))

    def sizes_of(jaxpr: Any) -> Iterator[int]:
        for eqn in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in eqn.outvars)
            for value in eqn.params.values():
                for sub in value if isinstance(value, tuple | list) else [value]:
                    if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                        yield from sizes_of(getattr(sub, "jaxpr", sub))

    # K = 2 tiles of 128 rows; L x L of one head would be sixteen times as much.
    assert max(sizes_of(traced.jaxpr)) == 2 * 128 * sizes.tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget", 0),
        ("buffer", 0),
        ("window", 0),
        ("window", 1024),
        ("kernel", 4),
        ("kernel", 0),
        ("threshold", -0.1),
        ("threshold", 1.0),
        ("mix", 1.5),
        ("mix", -0.5),
        ("dense_layers", (-1,)),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: Any):
    with pytest.raises(ConfigError, match=f"policy.{field}"):
        RKV(**{field: value})
