"""Quest against its definition, written out in float64 loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cache.policies.base import PolicyState
from jaxllm.cache.policies.heads import repeat_live
from jaxllm.cache.policies.quest import Quest
from jaxllm.cache.view import Layout, View
from jaxllm.config import ConfigError
from pallas_kernels.paged_attention import QuantizedPages, dequantize_pages
from tests.cache.policies.views import layout, view

SELECT = jax.jit(Quest.select, static_argnums=0)
APPEND = jax.jit(Quest.on_append, static_argnums=0)


def drawn(sizes: Layout, rows: int, rng: np.random.Generator, W: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Keys [B, K, L, d] and queries [B, W, H, d]."""
    k = rng.normal(size=(rows, sizes.kv_heads, sizes.tokens, sizes.head_dim))
    q = rng.normal(size=(rows, W, sizes.kv_heads * sizes.group, sizes.head_dim))
    return k.astype(np.float32), q.astype(np.float32)


def sealed_state(policy: Quest, sizes: Layout, seen: View, garbage: float = np.nan) -> PolicyState:
    """The policy's state after every page of the view was sealed; what belongs to other pages is garbage."""
    state = jax.tree.map(lambda x: jnp.full_like(x, garbage), policy.init(sizes))
    used = jnp.arange(sizes.pages_per_slot) < (seen.sealed // sizes.page)[:, None]
    pages = jnp.where(used, seen.table, sizes.pages).reshape(-1)
    pool = dequantize_pages(seen.k_pages) if isinstance(seen.k_pages, QuantizedPages) else seen.k_pages
    k = pool[jnp.minimum(pages, sizes.pages - 1)]
    return APPEND(policy, state, pages, k, k)


def page_order(policy: Quest, k: np.ndarray, q: np.ndarray, page: int, sealed: int) -> list[int]:
    """Pages of one row and KV head, best first: keys [L, d] against the group's queries [W, G, d]."""
    scores = []
    for p in range(sealed):
        keys = k[p * page : (p + 1) * page].astype(np.float64)
        low, high = keys.min(0), keys.max(0)
        if policy.scorer != "minmax":
            spread = keys.std(0) if policy.scorer == "mean+std" else 0
            low, high = keys.mean(0) - spread, keys.mean(0) + spread
        by_query = []
        for queries in q.astype(np.float64):
            heads = [sum(max(x * a, x * b) for x, a, b in zip(w, low, high, strict=True)) for w in queries]
            by_query.append({"max": max, "mean": np.mean, "sum": sum}[policy.reduce](heads))
        scores.append(max(by_query))
    return sorted(range(sealed), key=lambda p: -scores[p])


def by_group(q: np.ndarray, sizes: Layout, row: int, head: int) -> np.ndarray:
    return q[row, :, head * sizes.group : (head + 1) * sizes.group]


@pytest.mark.parametrize("scorer", ["minmax", "mean", "mean+std"])
@pytest.mark.parametrize(("reduce", "W"), [("max", 1), ("mean", 1), ("sum", 3), ("mean", 2)])
def test_the_best_pages_are_chosen(scorer: str, reduce: str, W: int, seed: int):
    rng, sizes, lengths = np.random.default_rng(seed), layout(), [27, 17, 3]
    policy = Quest(budget=12, reduce=reduce, scorer=scorer)
    k, q = drawn(sizes, 3, rng, W)
    seen = view(sizes, k, k, lengths, rng)
    found = SELECT(policy, sealed_state(policy, sizes, seen), jnp.asarray(q), seen)
    assert found.logical.shape == (3, 2, 2)
    for row, length in enumerate(lengths):
        for head in range(2):
            wanted = page_order(policy, k[row, head], by_group(q, sizes, row, head), 4, length // 4)[:2]
            assert found.logical[row, head].tolist() == wanted + [-1] * (2 - len(wanted))
            assert int(found.count[row, head]) == len(wanted)


@given(
    keys=st.lists(st.integers(-100, 100), min_size=96, max_size=96),
    query=st.lists(st.integers(-100, 100), min_size=4, max_size=4),
    page=st.sampled_from([1, 2, 4, 8]),
)
def test_no_key_scores_above_the_bound_of_its_page(keys: list[int], query: list[int], page: int):
    """Small integers, so that float32 is exact: what would score best lies in a page that no other page's bound beats."""
    sizes = layout(page=page, pages_per_slot=24 // page, kv_heads=1, group=1, head_dim=4)
    k = np.asarray(keys, np.float32).reshape(1, 1, 24, 4)
    k = np.pad(k, ((0, 0), (0, 0), (0, sizes.tail), (0, 0)))
    q = np.asarray(query, np.float32).reshape(1, 1, 1, 4)
    seen = view(sizes, k, k, [24], np.random.default_rng(page))
    policy = Quest(budget=24 + page)
    state = sealed_state(policy, sizes, seen)
    pages = np.asarray(seen.table)[0]
    low, high = (np.asarray(state.per_page[name])[pages, 0] for name in ("low", "high"))
    bound = np.maximum(q[0, 0, 0] * low, q[0, 0, 0] * high).sum(-1)
    true = (k[0, 0, :24] @ q[0, 0, 0]).reshape(24 // page, page).max(-1)
    assert np.all(bound >= true) and (page > 1 or np.array_equal(bound, true))
    found = SELECT(policy, state, jnp.asarray(q), seen)
    assert np.all(np.diff(bound[np.asarray(found.logical)[0, 0]]) <= 0)
    np.testing.assert_array_equal(np.sort(found.logical[0, 0]), np.arange(24 // page))


def test_pages_of_one_token_are_the_exact_best_tokens(seed: int):
    rng, sizes = np.random.default_rng(seed), layout(page=1, pages=48, pages_per_slot=20, tail=2, group=1)
    k, q = drawn(sizes, 2, rng)
    seen = view(sizes, k, k, [20, 13], rng)
    policy = Quest(budget=6)
    found = SELECT(policy, sealed_state(policy, sizes, seen), jnp.asarray(q), seen)
    for row, length in enumerate([20, 13]):
        for head in range(2):
            scores = k[row, head, :length].astype(np.float64) @ q[row, 0, head]
            assert found.logical[row, head].tolist() == np.argsort(-scores)[:5].tolist()


@pytest.mark.parametrize("budget", [28, 1000, 1.0])
def test_a_full_budget_selects_every_sealed_page_once(budget: int | float, seed: int):
    rng, sizes, lengths = np.random.default_rng(seed), layout(slots=4), [27, 24, 9, 2]
    k, q = drawn(sizes, 4, rng)
    seen = view(sizes, k, k, lengths, rng)
    policy = Quest(budget=budget)
    found = SELECT(policy, sealed_state(policy, sizes, seen), jnp.asarray(q), seen)
    assert found.logical.shape[2] == sizes.pages_per_slot
    for row, length in enumerate(lengths):
        assert found.count[row].tolist() == [length // 4] * 2
        for head in range(2):
            chosen = found.logical[row, head].tolist()
            assert sorted(chosen[: length // 4]) == list(range(length // 4))
            assert set(chosen[length // 4 :]) <= {-1}


@pytest.mark.parametrize(
    ("budget", "page", "there", "read"),
    [
        (512, 16, 1000, 32),
        (512, 16, 20, 20),
        (100, 16, 64, 6),
        (0.1, 16, 100, 10),
        (0.1, 16, 101, 11),
        (0.3, 16, 10, 3),
        (0.01, 16, 100, 3),
        (0.01, 16, 2, 2),
        (1.0, 4, 77, 77),
    ],
)
def test_budgets_are_whole_pages(budget: int | float, page: int, there: int, read: int):
    assert Quest(budget=budget).pages(there, page) == read


def test_a_fraction_gives_each_row_its_own_count(seed: int):
    rng, sizes, lengths = (
        np.random.default_rng(seed),
        layout(slots=4, pages=99, pages_per_slot=20),
        [81, 50, 20],
    )
    k, q = drawn(sizes, 3, rng)
    seen = view(sizes, k, k, lengths, rng)
    policy = Quest(budget=0.25)
    found = SELECT(policy, sealed_state(policy, sizes, seen), jnp.asarray(q), seen)
    # 21, 13 and 6 pages with the tail's, of which a quarter, the tail's included, and at least three.
    assert found.count[:, 0].tolist() == [5, 3, 2] and found.logical.shape[2] == 5
    for row, count in enumerate([5, 3, 2]):
        wanted = page_order(policy, k[row, 0], by_group(q, sizes, row, 0), 4, lengths[row] // 4)[:count]
        assert found.logical[row, 0].tolist() == wanted + [-1] * (5 - count)


@given(chunks=st.lists(st.integers(1, 4), min_size=2, max_size=6), seed=st.integers(0, 2**16))
def test_boxes_do_not_depend_on_how_pages_were_sealed(chunks: list[int], seed: int):
    """Whole pages in any order and number, pages used before, and slots of the scatter that name none."""
    rng, sizes, policy = np.random.default_rng(seed), layout(), Quest(budget=12)
    n = sum(chunks)
    k = rng.normal(size=(n, 2, 4, 8)).astype(np.float32)
    pages = rng.permutation(sizes.pages)[:n]
    state = policy.init(sizes)
    old = rng.normal(size=(sizes.pages, 2, 4, 8)).astype(np.float32) * 9
    state = APPEND(policy, state, jnp.arange(sizes.pages), jnp.asarray(old), jnp.asarray(old))
    order, at = rng.permutation(n), 0
    for size in chunks:
        part = order[at : at + size]
        names = np.concatenate([pages[part], np.full(4 - size, sizes.pages + 3)])
        padded = np.concatenate([k[part], np.full((4 - size, 2, 4, 8), np.nan, np.float32)])
        state, at = (
            APPEND(policy, state, jnp.asarray(names), jnp.asarray(padded), jnp.asarray(padded)),
            at + size,
        )
    old[pages] = k
    np.testing.assert_array_equal(state.per_page["low"], old.min(2))
    np.testing.assert_array_equal(state.per_page["high"], old.max(2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_boxes_hold_keys_of_any_dtype(dtype: Any):
    rng, sizes, policy = np.random.default_rng(1), layout(), Quest(budget=12)
    k = jnp.asarray(rng.normal(size=(3, 2, 4, 8)) * 100, dtype)
    state = APPEND(policy, policy.init(sizes), jnp.asarray([5, 2, 9]), k, k)
    low, high = (np.asarray(state.per_page[name])[[5, 2, 9]] for name in ("low", "high"))
    k = np.asarray(k, np.float32)
    np.testing.assert_array_equal(low, k.min(2))
    np.testing.assert_array_equal(high, k.max(2))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_keys_are_boxed_as_attention_multiplies_them(bits: int):
    rng, sizes = np.random.default_rng(bits), layout(page=2, pages_per_slot=4, group=1)
    k, q = drawn(sizes, 1, rng)
    seen = view(sizes, k, k, [8], rng, bits)
    policy = Quest(budget=6)
    state = sealed_state(policy, sizes, seen)
    keys = np.asarray(seen.keys())[0, :, :8].reshape(2, 4, 2, 8)
    np.testing.assert_array_equal(
        np.asarray(state.per_page["high"])[seen.table[0]], keys.max(2).swapaxes(0, 1)
    )
    found = SELECT(policy, state, jnp.asarray(q), seen)
    for head in range(2):
        shown = np.asarray(seen.keys())[0, head]
        assert (
            found.logical[0, head].tolist() == page_order(policy, shown, q[0, :, head : head + 1], 2, 4)[:2]
        )


def test_rows_choose_alone_and_wherever_their_pages_lie(seed: int):
    rng, sizes, lengths = np.random.default_rng(seed), layout(), [27, 17, 22]
    k, q = drawn(sizes, 3, rng)
    policy = Quest(budget=16)

    def choose(rows: list[int], sizes: Layout, garbage: float) -> np.ndarray:
        seen = view(sizes, k[rows], k[rows], [lengths[row] for row in rows], rng)
        return np.asarray(
            SELECT(policy, sealed_state(policy, sizes, seen, garbage), jnp.asarray(q[rows]), seen).logical
        )

    together = choose([0, 1, 2], sizes, np.nan)
    np.testing.assert_array_equal(choose([0, 1, 2], sizes, np.inf), together)
    np.testing.assert_array_equal(choose([2, 0, 1], sizes, 1e30), together[[2, 0, 1]])
    for row in range(3):
        np.testing.assert_array_equal(choose([row], layout(pages=7), np.nan)[0], together[row])


def test_a_window_reads_the_same_however_far_it_is_padded(seed: int):
    rng, sizes = np.random.default_rng(seed), layout()
    k, q = drawn(sizes, 1, rng, W=2)
    seen = view(sizes, k, k, [25], rng)
    policy = Quest(budget=12)
    state = sealed_state(policy, sizes, seen)
    short = SELECT(policy, state, jnp.asarray(q), seen)
    padded = jnp.asarray(np.concatenate([q, 100 * q], axis=1))
    padded = repeat_live(padded, jnp.asarray([[True, True, False, False]]))
    np.testing.assert_array_equal(SELECT(policy, state, padded, seen).logical, short.logical)


def test_recall_grows_with_the_budget_and_beats_blind_choices(seed: int):
    """Keys that drift, as texts do: the share of the ten best tokens in what is read (the paper's figure 4)."""
    rng = np.random.default_rng(seed)
    sizes = layout(slots=8, pages=512, pages_per_slot=64, kv_heads=1, group=1, head_dim=16)
    steps = rng.normal(size=(8, 1, sizes.tokens, 16)) * 0.4
    k = np.zeros_like(steps)
    for t in range(1, sizes.tokens):
        k[:, :, t] = 0.95 * k[:, :, t - 1] + steps[:, :, t]
    k = k.astype(np.float32)
    q = rng.normal(size=(8, 1, 1, 16)).astype(np.float32)
    seen = view(sizes, k, k, [256] * 8, rng)
    scores = np.einsum("bld,bd->bl", k[:, 0, :256], q[:, 0, 0])
    best = np.argsort(-scores, axis=1)[:, :10] // 4

    def recall(pages: np.ndarray) -> float:
        return float(np.mean([np.isin(best[row], pages[row]).mean() for row in range(8)]))

    found = []
    for budget in (12, 36, 68, 132):
        policy = Quest(budget=budget)
        chosen = np.asarray(SELECT(policy, sealed_state(policy, sizes, seen), jnp.asarray(q), seen).logical)[
            :, 0
        ]
        found.append(recall(chosen))
        recent = np.broadcast_to(np.arange(64 - chosen.shape[1], 64), chosen.shape)
        blind = np.stack([rng.permutation(64)[: chosen.shape[1]] for _ in range(8)])
        assert found[-1] > max(recall(recent), recall(blind)) + 0.1
    assert found == sorted(found) and found[2] > 0.9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 0}, "policy.budget=0"),
        ({"budget": -0.5}, "policy.budget=-0.5"),
        ({"budget": 1.5}, "policy.budget=1.5"),
        ({"budget": True}, "policy.budget=True"),
        ({"reduce": "median"}, "policy.reduce='median'"),
        ({"scorer": "best"}, "policy.scorer='best'"),
        ({"dense_layers": (-1,)}, "policy.dense_layers"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        Quest(**settings)


def test_a_budget_without_room_to_choose_is_refused():
    Quest(budget=8).check(layout())
    Quest(budget=0.001).check(layout())
    with pytest.raises(ConfigError, match=r"policy.budget=7: at least 8 tokens"):
        Quest(budget=7).check(layout())
    assert Quest().at(1) != Quest() == Quest().at(2)
