"""Tactic against its definition, written out in float64 loops over single queries and single tokens."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.cache.policies.base import PolicyState
from jaxllm.cache.policies.tactic import Tactic
from jaxllm.cache.view import Layout, View
from jaxllm.config import ConfigError
from tests.cache.policies.views import layout, view

SELECT = jax.jit(Tactic.select, static_argnums=0)
MAINTAIN = jax.jit(Tactic.maintain, static_argnums=0)
TRIGGERS = jax.jit(Tactic.triggers, static_argnums=0)

SMALL = Tactic(cluster=4, head=0.05, width=0.05, sinks=2, refresh=24, most=1.0)
SIZES = layout(slots=4, pages=120, pages_per_slot=30)
LENGTHS = [117, 83, 40]


def drawn(sizes: Layout, rows: int, rng: np.random.Generator, W: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Keys in blobs [B, K, L, d], and queries [B, W, H, d] that prefer some of them."""
    centres = rng.normal(size=(rows, sizes.kv_heads, 12, sizes.head_dim)) * 2
    k = np.take_along_axis(centres, rng.integers(0, 12, (rows, sizes.kv_heads, sizes.tokens, 1)), axis=2)
    q = rng.normal(size=(rows, W, sizes.kv_heads * sizes.group, sizes.head_dim))
    return (k + rng.normal(size=k.shape) * 0.5).astype(np.float32), q.astype(np.float32)


def clustered(policy: Tactic, sizes: Layout, seen: View) -> PolicyState:
    """State at the end of the rows' prompts."""
    return MAINTAIN(policy, policy.init(sizes), seen, jnp.full(len(seen.slots), True))[0]


def later(seen: View, sizes: Layout, k: np.ndarray, lengths: list[int], rng: np.random.Generator) -> View:
    """Another view of the same slots: after more tokens."""
    return replace(view(sizes, k, k, lengths, rng), slots=seen.slots)


def chosen(selection: Any, row: int, head: int) -> list[int]:
    """The selected tokens, after checking that nothing lies past the count."""
    tokens, count = np.asarray(selection.logical)[row, head], int(np.asarray(selection.count)[row, head])
    assert np.all(tokens[count:] == -1) and np.all(tokens[:count] >= 0)
    assert len(set(tokens[:count].tolist())) == count
    return tokens[:count].tolist()


def least(y: np.ndarray, mass: float) -> int:
    return int(np.argmax(np.cumsum(y) >= mass * y.sum())) + 1


def order_of(policy: Tactic, state: PolicyState, slot: int, head: int, q: np.ndarray) -> list[list[int]]:
    """Lists of the members of each cluster, best first, for one query."""
    size, members, centroids = (
        np.asarray(state.per_slot[w])[slot, head] for w in ("size", "members", "centroids")
    )
    lists = np.split(members[: size.sum()], np.cumsum(size)[:-1])
    products = centroids.astype(np.float64) @ q
    return [lists[c].tolist() for c in np.argsort(-products, kind="stable") if size[c]]


def budget_of(policy: Tactic, ranked: list[int], keys: np.ndarray, q: np.ndarray, scale: float) -> int:
    """Steps 2 and 3 of the method for one query: y exact at the first ranks, a / x + b through two windows."""
    n = len(ranked)
    if n == 0 or policy.mass == 1:
        return n
    y = np.exp(scale * keys[ranked].astype(np.float64) @ q)
    m, width = (max(int(np.ceil(f * n - 1e-9)), 1) for f in (policy.head, policy.width))
    means, inverse = [], []
    for middle in policy.windows:
        start = int(np.ceil(middle * n - 1e-9)) - 1 - width // 2
        start = min(max(start, 0), n - width)
        means.append(y[start : start + width].mean())
        inverse.append((1 / np.arange(start + 1, start + width + 1)).mean())
    a = (means[0] - means[1]) / (inverse[0] - inverse[1])
    b = means[0] - a * inverse[0]
    estimate = np.maximum(a / np.arange(1, n + 1) + b, 0)
    estimate[:m] = y[:m]
    return min(max(least(estimate, policy.mass), m), n)


def expected(
    policy: Tactic, state: PolicyState, slot: int, head: int, keys: np.ndarray, q: np.ndarray, scale: float
) -> set[int]:
    """The union of the clustered tokens that some queries [Q, d] read."""
    read: set[int] = set()
    for one in q.astype(np.float64):
        ranked = [token for members in order_of(policy, state, slot, head, one) for token in members]
        read |= set(ranked[: budget_of(policy, ranked, keys, one, scale)])
    return read


def group_of(q: np.ndarray, sizes: Layout, row: int, head: int) -> np.ndarray:
    """All queries [W G, d] of a KV head."""
    return q[row, :, head * sizes.group : (head + 1) * sizes.group].reshape(-1, sizes.head_dim)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(("mass", "W"), [(0.5, 1), (0.9, 1), (0.75, 3)])
def test_tokens_are_chosen_as_defined(mass: float, W: int, bits: int | None):
    rng, policy = np.random.default_rng(5), replace(SMALL, mass=mass)
    k, q = drawn(SIZES, 3, rng, W)
    state = clustered(policy, SIZES, view(SIZES, k, k, LENGTHS, rng, bits))
    grown = [length + extra for length, extra in zip(LENGTHS, (3, 22, 9), strict=True)]
    seen = view(SIZES, k, k, grown, rng, bits)
    found, keys = SELECT(policy, state, jnp.asarray(q), seen), np.asarray(seen.keys())
    smaller = 0
    for row in range(3):
        always = {0, 1, *range(LENGTHS[row] // 4 * 4, grown[row] // 4 * 4)}
        for head in range(2):
            wanted = expected(
                policy, state, row, head, keys[row, head], group_of(q, SIZES, row, head), SIZES.scale
            )
            assert not wanted & always
            assert set(chosen(found, row, head)) == wanted | always
            smaller += len(wanted) < LENGTHS[row] // 4 * 4 - 2
    assert smaller >= 4


def on_a_curve(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One query, n keys whose exp(score) at rank x is 5 / x + 0.02, and their softmax."""
    q = rng.normal(size=8)
    y = 5 / np.arange(1, n + 1) + 0.02
    off = rng.normal(size=(n, 8))
    off -= (off @ q)[:, None] * q / (q @ q)
    k = rng.permutation(np.log(y))[:, None] * q / (q @ q) + off
    return q, k, np.exp(k @ q) / y.sum()


@pytest.mark.parametrize("mass", [0.3, 0.5, 0.75, 0.9])
def test_where_the_estimates_are_exact_the_set_is_the_least_that_holds_the_mass(mass: float, seed: int):
    """Every token is its own cluster and the scores lie on the curve: order, fit and budget are those of the softmax."""
    rng, n = np.random.default_rng(seed), 120
    sizes = layout(slots=1, pages=30, pages_per_slot=30, kv_heads=1, group=1, scale=1.0)
    q, keys, weight = on_a_curve(rng, n)
    k = np.zeros((1, 1, sizes.tokens, 8), np.float32)
    k[0, 0, :n] = keys
    policy = Tactic(mass=mass, cluster=1, head=0.01, width=0.01, sinks=0, refresh=4, most=1.0)
    seen = view(sizes, k, k, [n], rng)
    state = clustered(policy, sizes, seen)
    assert state.per_slot["size"].tolist() == [[[1] * n]]
    found = SELECT(policy, state, jnp.asarray(q, jnp.float32).reshape(1, 1, 1, 8), seen)
    tokens = chosen(found, 0, 0)
    assert set(tokens) == set(np.argsort(-weight)[: len(tokens)].tolist())
    held = weight[tokens].sum()
    assert held >= mass - 1e-4 and held - weight[tokens].min() <= mass + 1e-4
    # What attention over a part can be off by, for values of any direction.
    v = rng.normal(size=(n, 4))
    part = weight[tokens] @ v[tokens] / held
    assert np.linalg.norm(weight @ v - part) <= 2 * (1 - held) * np.linalg.norm(v, axis=1).max() + 1e-9


def test_all_of_the_mass_is_every_sealed_token_once(seed: int):
    rng, policy = np.random.default_rng(seed), replace(SMALL, mass=1.0, most=0.1)
    k, q = drawn(SIZES, 3, rng)
    seen = view(SIZES, k, k, LENGTHS, rng)
    for state in (clustered(policy, SIZES, seen), policy.init(SIZES)):
        grown = later(seen, SIZES, k, [119, 95, 41], rng)
        found = SELECT(policy, state, jnp.asarray(q), grown)
        for row, sealed in enumerate([116, 92, 40]):
            for head in range(2):
                assert sorted(chosen(found, row, head)) == list(range(sealed))


def test_more_mass_reads_more_and_a_group_reads_the_union_of_its_queries(seed: int):
    rng = np.random.default_rng(seed)
    k, q = drawn(SIZES, 3, rng, W=2)
    seen = view(SIZES, k, k, LENGTHS, rng)
    state = clustered(SMALL, SIZES, seen)
    before: list[set[int]] = [set()] * 6
    for mass in (0.3, 0.9, 1.0):
        policy = replace(SMALL, mass=mass)
        found = SELECT(policy, state, jnp.asarray(q), seen)
        after = [set(chosen(found, row, head)) for row in range(3) for head in range(2)]
        assert all(a <= b for a, b in zip(before, after, strict=True))
        union: list[set[int]] = [set() for _ in range(6)]
        for w in range(2):
            for member in range(2):
                alone = SELECT(policy, state, jnp.asarray(q[:, w : w + 1, member::2]), seen)
                for at in range(6):
                    union[at] |= set(chosen(alone, at // 2, at % 2))
        assert union == after
        before = after


def test_a_bound_keeps_sinks_fresh_tokens_and_the_best_clusters(seed: int):
    rng, policy = np.random.default_rng(seed), replace(SMALL, mass=0.99, most=0.1, refresh=8)
    sizes = replace(SIZES, group=1)
    k, q = drawn(sizes, 3, rng)
    seen = view(sizes, k, k, LENGTHS, rng)
    state = clustered(policy, sizes, seen)
    free = SELECT(replace(policy, most=1.0), state, jnp.asarray(q), later(seen, sizes, k, [121, 87, 47], rng))
    cut = SELECT(policy, state, jnp.asarray(q), later(seen, sizes, k, [121, 87, 47], rng))
    # Sinks, a tenth of 120 and the room of fresh tokens; of the clustered ones a tenth of the row's own.
    assert cut.logical.shape[2] == 2 + 12 + 8
    for row in range(3):
        fresh = set(range(LENGTHS[row] // 4 * 4, [121, 87, 47][row] // 4 * 4))
        room = [12, 9, 5][row]
        for head in range(2):
            whole, tokens = chosen(free, row, head), chosen(cut, row, head)
            assert len(whole) > len(tokens) == 2 + room + len(fresh) and {0, 1} | fresh <= set(tokens)
            ranked = [t for c in order_of(policy, state, row, head, q[row, 0, head]) for t in c]
            assert set(tokens) - {0, 1} - fresh == set(ranked[:room])


def test_fresh_slots_read_everything(seed: int):
    rng = np.random.default_rng(seed)
    k, q = drawn(SIZES, 3, rng)
    found = SELECT(SMALL, SMALL.init(SIZES), jnp.asarray(q), view(SIZES, k, k, [22, 9, 2], rng))
    for row, sealed in enumerate([20, 8, 0]):
        for head in range(2):
            assert chosen(found, row, head) == list(range(sealed))


def test_clusters_hold_each_sealed_token_once_and_only_rows_that_triggered_change(seed: int):
    rng = np.random.default_rng(seed)
    k, _ = drawn(SIZES, 3, rng)
    seen = replace(view(SIZES, k, k, LENGTHS, rng), slots=jnp.asarray([2, 0, 4]))
    old = clustered(SMALL, SIZES, view(SIZES, k[:, :, ::-1], k, [60, 60, 60], rng))
    new, keep = MAINTAIN(SMALL, old, seen, jnp.asarray([True, False, True]))
    assert keep is None
    for name, leaf in new.per_slot.items():
        np.testing.assert_array_equal(np.delete(leaf, 2, 0), np.delete(old.per_slot[name], 2, 0))
    assert new.per_slot["clustered"].tolist() == [60, 60, 116, 0]
    for head in range(2):
        lists = order_of(SMALL, new, 2, head, np.ones(8))
        assert sorted(token for one in lists for token in one) == list(range(2, 116)) and len(lists) <= 29
    again, _ = MAINTAIN(SMALL, new, seen, jnp.asarray([True, False, True]))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, new))


def test_rows_are_clustered_and_read_alone_wherever_they_lie(seed: int):
    rng = np.random.default_rng(seed)
    k, q = drawn(SIZES, 3, rng)

    def choose(rows: list[int], sizes: Layout, slots: list[int]) -> Any:
        seen = view(sizes, k[rows][:, :, : sizes.tokens], k, [LENGTHS[row] for row in rows], rng)
        seen = replace(seen, slots=jnp.asarray(slots))
        return SELECT(SMALL, clustered(SMALL, sizes, seen), jnp.asarray(q[rows]), seen)

    together = choose([0, 1, 2], SIZES, [1, 3, 0])
    turned = choose([2, 0, 1], SIZES, [0, 1, 2])
    alone = choose([2], layout(slots=1, pages=12, pages_per_slot=11), [0])
    for head in range(2):
        for at, row in enumerate([2, 0, 1]):
            assert chosen(turned, at, head) == chosen(together, row, head)
        assert set(chosen(alone, 0, head)) == set(chosen(together, 2, head))


def test_a_step_that_shows_fewer_pages_reads_the_same(seed: int):
    rng = np.random.default_rng(seed)
    k, q = drawn(SIZES, 3, rng)
    wide = view(SIZES, k, k, [60, 31, 44], rng)
    narrow = replace(wide, table=wide.table[:, :15])
    whole = SELECT(SMALL, clustered(SMALL, SIZES, wide), jnp.asarray(q), wide)
    part = SELECT(SMALL, clustered(SMALL, SIZES, narrow), jnp.asarray(q), narrow)
    assert part.logical.shape[2] == 60
    for row in range(3):
        for head in range(2):
            assert chosen(part, row, head) == chosen(whole, row, head)


def test_prompts_ends_and_fresh_tokens_trigger(seed: int):
    rng = np.random.default_rng(seed)
    k, _ = drawn(SIZES, 3, rng)
    seen = view(SIZES, k, k, LENGTHS, rng)
    ended = jnp.asarray([True, True, False])
    assert TRIGGERS(SMALL, SMALL.init(SIZES), seen, ended).tolist() == [True, True, True]
    state = clustered(SMALL, SIZES, seen)
    assert TRIGGERS(SMALL, state, seen, ended).tolist() == [False] * 3
    # 116, 80 and 40 tokens are in clusters; refresh is 24.
    for lengths, ended, due in (
        ([119, 103, 63], False, [False, False, False]),
        ([120, 104, 64], False, [False, True, True]),
        ([120, 83, 44], True, [True, False, True]),
    ):
        grown = later(seen, SIZES, k, lengths, rng)
        assert TRIGGERS(SMALL, state, grown, jnp.full(3, ended)).tolist() == due


def mixture(n: int, d: int, trials: int, seed: int, policy: Tactic) -> dict[str, float]:
    """What Tactic reads of a mixture of Gaussians, as the published table tells it: tokens, mass and success."""
    rng = np.random.default_rng(seed)
    sizes = layout(slots=1, pages=n // 16, pages_per_slot=n // 16, page=16, tail=16, kv_heads=1)
    sizes = replace(sizes, group=1, head_dim=d, scale=d**-0.5)
    centres = rng.normal(size=(n // 128, d))
    k = centres[rng.integers(0, len(centres), n)] + rng.normal(size=(n, d)) * 0.5
    q = rng.normal(size=(trials, d)) * 3
    keys = np.zeros((1, 1, sizes.tokens, d), np.float32)
    keys[0, 0, :n] = k
    seen = view(sizes, keys, keys, [n], rng)
    state = clustered(policy, sizes, seen)
    weight = np.exp(sizes.scale * k @ q.T)
    found: dict[str, list[float]] = {"least": [], "clusters": [], "tokens": [], "mass": [], "success": []}
    queries = jnp.asarray(q, jnp.float32)[:, None, None]
    for i in range(trials):
        tokens = chosen(SELECT(policy, state, queries[i : i + 1], seen), 0, 0)
        ranked = [t for c in order_of(policy, state, 0, 0, q[i]) for t in c]
        share = weight[tokens, i].sum() / weight[:, i].sum()
        found["least"].append(least(np.sort(weight[:, i])[::-1], policy.mass))
        found["clusters"].append(least(weight[ranked, i], policy.mass))
        found["tokens"].append(len(tokens))
        found["mass"].append(share)
        found["success"].append(share >= policy.mass)
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_what_is_read_of_a_mixture_holds_about_the_mass(record_property: Any):
    """Calibration is told, not asserted (the method misses its mass now and then); only what no noise explains is."""
    policy = Tactic(mass=0.9, cluster=16, sinks=0, most=1.0, refresh=16)
    found = mixture(1024, 32, 24, 3, policy)
    for name, value in found.items():
        record_property(name, value)
    print(found)
    assert found["least"] <= found["clusters"] and found["mass"] > 0.8 and found["tokens"] < 700


@pytest.mark.slow
def test_calibration_is_like_the_published_one(record_property: Any):
    """n = 8,192, d = 64, 32 tokens a cluster: the published table says 1,723 tokens by clusters, 1,975 read, 0.91, 0.86."""
    policy = Tactic(mass=0.9, cluster=32, sinks=0, most=1.0, refresh=16)
    for head in (0.02, 0.001):
        found = mixture(8192, 64, 60, 4, replace(policy, head=head))
        for name, value in found.items():
            record_property(f"{head} {name}", value)
        print(head, found)
        if head == 0.02:
            assert found["mass"] > 0.85 and found["least"] < found["clusters"] < 8192 / 4 > found["tokens"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mass": 0.0}, "policy.mass=0"),
        ({"mass": 1.1}, "policy.mass=1.1"),
        ({"cluster": 0}, "policy.cluster=0"),
        ({"rounds": 0}, "policy.rounds=0"),
        ({"head": 2.0}, "policy.head=2.0"),
        ({"width": 0.0}, "policy.width=0"),
        ({"most": 0.0}, "policy.most=0"),
        ({"windows": (0.6, 0.1)}, "policy.windows"),
        ({"windows": (0.6, 1.1)}, "policy.windows"),
        ({"refresh": 0}, "policy.refresh=0"),
        ({"sinks": -1}, "policy.sinks=-1"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        Tactic(**settings)
