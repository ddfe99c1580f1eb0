"""Updates and suspended slots on the device, against loops in NumPy: every leaf of every layer, to the bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import H2O, KVCache, Pillar, Policy, Quest
from jaxllm.cache.apply import applied, init_snapshots
from jaxllm.cache.paged import PagedState
from jaxllm.cache.state import init_cache
from jaxllm.cache.swap import parked, unparked
from jaxllm.cache.update import Copies, Saves, Starts, Update
from jaxllm.config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig

S, P, R, PAGE, CAPACITY = 4, 11, 3, 4, 16
N = CAPACITY // PAGE
CFG = ModelConfig(
    vocab_size=8,
    hidden_size=8,
    pattern="M*-*W",
    mamba=MambaConfig(num_heads=2, head_dim=4, state_size=4, chunk_size=4),
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4, window=3),
    mlp=MLPConfig(8),
)
#: One layer with arrays of pages, one with arrays of slots.
POLICY = Policy(overrides=((0, Quest(budget=1.0, dense_layers=())), (1, Pillar(budget=1.0))))
#: What evicts has pages of its own: two groups.
EVICTING = Policy(overrides=((0, Quest(budget=1.0, dense_layers=())), (1, H2O(heavy=4, recent=4, buffer=2))))
APPLY = jax.jit(applied)


def filled(seed: int, dtype: str, policy: Policy = POLICY):
    """A cache and snapshots of random numbers, with tables of random pages; a second group has two pages less."""
    rng = np.random.default_rng(seed)
    pages = (P,) if policy is POLICY else (P, P - 2)
    cache = init_cache(CFG, S, CAPACITY, KVCache(dtype, PAGE), policy, pages)
    fill = lambda leaf: jnp.asarray(rng.integers(1, 99, leaf.shape), leaf.dtype)  # noqa: E731
    layers, snapshots = jax.tree.map(fill, (cache.layers, init_snapshots(cache, R)))
    groups = []
    for group, count in zip(cache.groups, pages):
        table = jnp.asarray(np.stack([rng.permutation(count)[:N] for _ in range(S)]), jnp.int32)
        sealed = jnp.asarray(rng.integers(0, N + 1, S) * PAGE, jnp.int32)
        groups.append(replace(group, table=table, length=sealed + 1, sealed=sealed))
    return replace(cache, layers=layers, groups=tuple(groups)), snapshots


def slot_of(source: int, pool: np.ndarray, kept: np.ndarray) -> np.ndarray:
    if source < 0:
        return np.zeros_like(pool[0])
    return pool[source] if source < S else kept[source - S]


def reference(cache, snapshots, update: Update):
    """The same, one instruction after the other."""
    cache, snapshots = jax.tree.map(np.asarray, (cache, snapshots))
    new, saved = jax.tree.map(np.copy, (cache, snapshots))
    starts = [each for each in zip(*update.starts) if each[0] < S]
    for old, state, kept, to in zip(cache.layers, new.layers, snapshots, saved):
        if kept is not None:
            for o, n, k, t in zip(*map(jax.tree.leaves, (old, state, kept, to))):
                for slot, _, _, source in starts:
                    n[slot] = slot_of(source, o, k)
                for place, source in zip(*update.saves):
                    if place < R:
                        t[place] = slot_of(source, o, k)
        elif isinstance(state, PagedState):
            of_pages = lambda s: jax.tree.leaves((s.k, s.v, s.memory.per_page))  # noqa: E731
            for o, n in zip(of_pages(old), of_pages(state)):
                for source, target in zip(*update.copies[0]):
                    if target < P:
                        n[target] = o[source]
            of_slots = lambda s: jax.tree.leaves((s.tail_k, s.tail_v, s.memory.per_slot))  # noqa: E731
            for o, n in zip(of_slots(old), of_slots(state)):
                for slot, _, tail, _ in starts:
                    n[slot] = o[tail] if tail >= 0 else 0
    old, group = cache.groups[0], new.groups[0]
    for slot, row in zip(update.slots, update.tables[0]):
        if slot < S:
            group.table[slot] = row
    for slot, tokens, tail, _ in starts:
        group.length[slot] = old.length[tail] if tail >= 0 else tokens
        group.sealed[slot] = old.sealed[tail] if tail >= 0 else tokens
    return new, saved


def same(mine, wanted) -> None:
    assert jax.tree.structure(mine) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(wanted)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


def update_of(rng: np.random.Generator) -> Update:
    """Any instructions: every source may be a target of the same update."""

    def some(most: int, longest: int | None = None):
        count = rng.integers(0, (longest or most) + 1)
        return rng.permutation(most)[:count].astype(np.int32)

    def sources(low: int, high: int, like: np.ndarray):
        return rng.integers(low, high, len(like)).astype(np.int32)

    slots, begun, targets, saves = some(S), some(S), some(P, 4), some(R)
    update = Update(
        slots,
        (rng.integers(0, P + 1, (len(slots), N)).astype(np.int32),),
        (Copies(sources(0, P, targets), targets),),
        Starts(begun, sources(0, N + 1, begun) * PAGE, sources(-1, S, begun), sources(-1, S + R, begun)),
        Saves(saves, sources(-1, S + R, saves)),
    )
    return update.padded(S, [P], R)


@pytest.mark.parametrize("dtype", ["float32", "int4"])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_an_update_is_its_instructions(dtype, seed):
    """Tables, page copies with scales and policy arrays, starts and saves; sources are read before they are written."""
    cache, snapshots = filled(seed, dtype)
    update = update_of(np.random.default_rng(seed))
    same(APPLY(cache, snapshots, update), reference(cache, snapshots, update))


@pytest.mark.parametrize("policy", [POLICY, EVICTING], ids=["one group", "two groups"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_slot_comes_back_in_another_one_and_in_other_pages(dtype, policy, rng):
    cache, _ = filled(5, dtype, policy)
    # Three sealed pages, and one where there is another group; the open tail is full, and no page yet.
    groups = (
        replace(g, length=g.length.at[1].set((n + 1) * PAGE), sealed=g.sealed.at[1].set(n * PAGE))
        for g, n in zip(cache.groups, (3, 1))
    )
    cache = replace(cache, groups=tuple(groups))
    contents = jax.device_get(jax.jit(parked)(cache, np.int32(1)))
    kept, rows, groups = [], [], []
    for old, pages in zip(cache.groups, (P, P - 2)):
        kept.append(np.asarray(old.table)[1, : int(old.sealed[1]) // PAGE])
        free = [page for page in range(pages) if page not in kept[-1]]
        # The new row names one page more than is sealed, which must stay as it is.
        row = np.full(N, pages, np.int32)
        row[: len(kept[-1]) + 1] = rng.permutation(free)[: min(len(kept[-1]) + 1, N)]
        rows.append(row)
        groups.append(replace(old, table=old.table.at[2].set(row)))
    moved = replace(cache, groups=tuple(groups))
    after = jax.jit(unparked)(moved, np.int32(2), contents)
    again = jax.device_get(jax.jit(parked)(after, np.int32(2)))
    same((again.tails, again.states, again.lengths), (contents.tails, contents.states, contents.lengths))
    for before, then, taken in zip(cache.layers, after.layers, contents.pages):
        if isinstance(then, PagedState):
            of_pages = [jax.tree.leaves((s.k, s.v, s.memory.per_page)) for s in (before, then)]
            count, source = len(kept[then.group]), kept[then.group]
            written = rows[then.group][:count]
            for old, new, carried in zip(*of_pages, jax.tree.leaves(taken), strict=True):
                np.testing.assert_array_equal(np.asarray(old)[source], carried[:count])
                np.testing.assert_array_equal(np.asarray(old)[source], np.asarray(new)[written])
                # All other pages and slots are as they were.
                np.testing.assert_array_equal(np.delete(old, written, 0), np.delete(new, written, 0))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(then)):
            if len(a) == S:
                np.testing.assert_array_equal(np.delete(a, 2, 0), np.delete(b, 2, 0))
    for old, new in zip(moved.groups, after.groups):
        assert int(new.length[2]) == int(old.length[1]) and int(new.sealed[2]) == int(old.sealed[1])
