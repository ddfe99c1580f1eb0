"""Paged layers against a plain model: chunks, decode steps, drafts, windows, evictions, any dtype and table."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.batch import PackedBatch
from jaxllm.cache import attend, paged_attention
from jaxllm.cache.kv import KVCache
from jaxllm.cache.options import AttendOptions
from jaxllm.cache.policies import Pillar, Quest
from jaxllm.cache.policies.base import Policy
from jaxllm.cache.state import Cache, init_cache, rolled_back, zero_slots
from jaxllm.config import AttentionConfig, ModelConfig
from pallas_kernels.paged_attention import dequantize_pages
from tests.cache.paged_model import PAGE, D, Ends, G, K, OddPages, Slot

SLOTS, CAPACITY, CHUNK, W = 3, 32, 8, 5
H = K * G
CFG = ModelConfig(
    vocab_size=8,
    hidden_size=8,
    pattern="*",
    attention=AttentionConfig(num_heads=H, num_kv_heads=K, head_dim=D),
)
KINDS = {
    "float32": (KVCache(page_size=PAGE), Policy(), 2e-5),
    "bfloat16": (KVCache("bfloat16", PAGE), Policy(), 2e-2),
    "int8": (KVCache("int8", PAGE, draft=W), Policy(), 2e-5),
    "int4 by channel": (KVCache("int4", PAGE, keys_per_channel=True), Policy(), 2e-5),
    "odd pages": (KVCache("int4", PAGE, draft=W), OddPages(), 2e-5),
    "ends": (KVCache(page_size=PAGE, draft=W), Ends(), 2e-5),
    "ends, int8": (KVCache("int8", PAGE), Ends(), 2e-5),
}


@functools.cache
def steps():
    # Policies, dtypes and layouts are static parts of the state.
    def extend(cache: Cache, q: Any, k: Any, v: Any, batch: PackedBatch, ended: Any, drafting: bool):
        (state,) = cache.opened()
        y, state, _ = attend.extend(state, q, k, v, batch, AttendOptions(ended=ended, drafting=drafting))
        return y, cache.closed((state,))

    def window(cache: Cache, q: Any, k: Any, v: Any, batch: PackedBatch):
        (state,) = cache.opened()
        return attend.window(state, q, k, v, batch, AttendOptions())

    def commit(cache: Cache, window: Any, accepted: Any):
        return cache.closed((attend.commit(window, accepted),))

    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    return jit(extend, static_argnames="drafting"), jit(window), jit(commit)


class Twin:
    """A cache and its model, driven together."""

    def __init__(self, kind: str, rng: np.random.Generator, shuffled: bool):
        self.kv, self.policy, self.tolerance = KINDS[kind]
        self.rng = rng
        n = CAPACITY // PAGE
        pages = (SLOTS * n + 4,) if shuffled else None
        cache = init_cache(CFG, SLOTS, CAPACITY, self.kv, self.policy, pages)
        fill = lambda leaf: jnp.asarray(rng.integers(1, 9, leaf.shape), leaf.dtype)  # noqa: E731
        cache = replace(cache, layers=jax.tree.map(fill, cache.layers))
        if shuffled:
            table = rng.permutation(SLOTS * n + 4)[: SLOTS * n].reshape(SLOTS, n)
            groups = (replace(cache.groups[0], table=jnp.asarray(table, jnp.int32)),)
            cache = replace(cache, groups=groups)
        self.cache = zero_slots(cache, jnp.arange(SLOTS))
        self.slots = [Slot([], []) for _ in range(SLOTS)]
        self.drafting = False
        # Positions go on where tokens are evicted.
        self.positions = [0] * SLOTS

    def values(self, rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Random q, k, v."""
        draw = lambda heads: self.rng.normal(size=(rows, length, heads, D)).astype(np.float32)  # noqa: E731
        return draw(H), draw(K), draw(K)

    def visible(self, slot: Slot, upto: int, length: int | None) -> list[int]:
        """Tokens that attention reads: those selected among the sealed ones where ``length`` are stored (None: no
        selection), and all that follow."""
        if length is None or not isinstance(self.policy, OddPages):
            return list(range(upto))
        return [i for i in range(upto) if i >= slot.sealed or (i // PAGE) % 2 == 1 - length % 2]

    def room(self, slot: int) -> int:
        return CAPACITY - len(self.slots[slot].k) - W - 1

    def settle(self, slot: int, ended: bool, able: bool = True) -> None:
        """Seal, and evict as ``Ends`` does."""
        mine = self.slots[slot]
        seal = lambda: mine.seal(self.kv.bits, self.kv.keys_per_channel, self.dtype)  # noqa: E731
        seal()
        if isinstance(self.policy, Ends) and able:
            p, length = self.policy, len(mine.k)
            if length >= p.most or (ended and length > p.head + p.recent):
                mine.keep([*range(p.head), *range(length - p.recent, length)])
                seal()

    @property
    def dtype(self) -> Any:
        return jnp.bfloat16 if self.kv.dtype == "bfloat16" else jnp.float32

    def extend(self, counts: list[int], length: int, drafting: bool = False, ended: bool = False) -> None:
        """A chunk (or with length 1 a decode step) of ``counts`` tokens for each slot."""
        q, k, v = self.values(SLOTS, length)
        batch = PackedBatch.from_rows(np.zeros((SLOTS, length)), lengths=counts, offset=self.positions)
        flags = np.full((SLOTS, 1), ended) & (np.asarray(counts) > 0)[:, None]
        y, self.cache = steps()[0](self.cache, q, k, v, batch, flags, drafting=drafting)
        for slot, count in enumerate(counts):
            mine = self.slots[slot]
            for i in range(count):
                mine.k.append(self.rounded(k[slot, i]))
                mine.v.append(self.rounded(v[slot, i]))
                expected = mine.attend(
                    q[slot, i], self.visible(mine, len(mine.k), None if length > 1 else len(mine.k))
                )
                np.testing.assert_allclose(y[slot, i], expected, rtol=self.tolerance, atol=self.tolerance)
            self.positions[slot] += count
            if count and not drafting:
                self.settle(slot, ended, length == 1 or ended)
        self.check()

    def rounded(self, token: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(token).astype(self.dtype).astype(jnp.float32))

    def draft(self) -> None:
        """Decode a few tokens, and take them back."""
        taken = [int(self.rng.integers(0, self.kv.draft + 1)) for _ in range(SLOTS)]
        before = jax.tree.map(np.asarray, (self.cache.layers[0].k, self.cache.layers[0].memory))
        self.drafting = True
        for step in range(max(taken)):
            self.extend([int(step < count) for count in taken], 1, drafting=True)
        self.drafting = False
        self.cache = rolled_back(self.cache, jnp.arange(SLOTS), jnp.asarray(taken))
        for slot, count in enumerate(taken):
            mine = self.slots[slot]
            self.positions[slot] -= count
            mine.k, mine.v = mine.k[: len(mine.k) - count], mine.v[: len(mine.v) - count]
        after = (self.cache.layers[0].k, self.cache.layers[0].memory)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(a, b)
        self.check()

    def window(self) -> None:
        """A tree of W nodes, of which one path's first nodes are committed."""
        q, k, v = self.values(SLOTS, W)
        parents = np.stack([[int(self.rng.integers(-1, i)) for i in range(W)] for _ in range(SLOTS)])
        batch = PackedBatch.from_rows(np.zeros((SLOTS, W)), offset=self.positions, parents=parents)
        y, window = steps()[1](self.cache, q, k, v, batch)
        accepted = np.zeros((SLOTS, W), bool)
        for slot in range(SLOTS):
            mine, paths = self.slots[slot], []
            for node in range(W):
                paths.append(([] if parents[slot, node] < 0 else paths[parents[slot, node]]) + [node])
                extra = Slot(
                    mine.k + [self.rounded(k[slot, i]) for i in paths[node]],
                    mine.v + [self.rounded(v[slot, i]) for i in paths[node]],
                    mine.sealed,
                )
                seen = self.visible(extra, len(extra.k), len(mine.k))
                expected = extra.attend(q[slot, node], seen)
                np.testing.assert_allclose(y[slot, node], expected, rtol=self.tolerance, atol=self.tolerance)
            path = paths[int(self.rng.integers(0, W))]
            path = path[: int(self.rng.integers(0, len(path) + 1))]
            accepted[slot, path] = True
            mine.k += [self.rounded(k[slot, i]) for i in path]
            mine.v += [self.rounded(v[slot, i]) for i in path]
            self.positions[slot] += len(path)
            if path:
                self.settle(slot, False)
        self.cache = steps()[2](self.cache, window, accepted)
        self.check()

    def admit(self) -> None:
        slot = int(self.rng.integers(0, SLOTS))
        self.cache = zero_slots(self.cache, jnp.asarray([slot, -1]))
        self.slots[slot], self.positions[slot] = Slot([], []), 0

    def check(self) -> None:
        np.testing.assert_array_equal(self.cache.groups[0].length, [len(s.k) for s in self.slots])
        np.testing.assert_array_equal(self.cache.groups[0].sealed, [s.sealed for s in self.slots])
        memory = self.cache.layers[0].memory.per_slot
        if memory and not self.drafting:
            np.testing.assert_array_equal(memory["queries"], self.positions)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), shuffled=st.booleans())
def test_a_layer_does_what_the_plain_model_does(kind: str, seed: int, shuffled: bool):
    rng = np.random.default_rng(seed)
    twin = Twin(kind, rng, shuffled)
    moves = ["chunk", "end", "decode", "decode", "window", "admit"] + ["draft"] * (twin.kv.draft > 0)
    for _ in range(12):
        move = rng.choice(moves)
        room = [twin.room(slot) for slot in range(SLOTS)]
        if move in ("chunk", "end"):
            counts = [int(rng.integers(0, max(0, min(CHUNK, r)) + 1)) for r in room]
            twin.extend(counts, CHUNK, ended=move == "end")
        elif move == "decode":
            for _ in range(int(rng.integers(1, 6))):
                twin.extend([int(rng.random() < 0.8 and twin.room(slot) > 0) for slot in range(SLOTS)], 1)
        elif min(room) > 0:
            getattr(twin, move)()


def test_metadata_come_from_the_keys_that_attention_multiplies(rng):
    cache = init_cache(CFG, SLOTS, CAPACITY, KVCache("int4", PAGE), Quest(dense_layers=(), budget=8))
    chunk = [rng.normal(size=(SLOTS, CHUNK, heads, D)).astype(np.float32) for heads in (H, K, K)]
    cache = steps()[0](cache, *chunk, PackedBatch.from_rows(np.zeros((SLOTS, CHUNK))), None, drafting=False)[
        1
    ]
    state, table = cache.layers[0], np.asarray(cache.groups[0].table)[:, : CHUNK // PAGE].reshape(-1)
    keys = np.asarray(dequantize_pages(state.k))[table]
    assert np.abs(keys - np.swapaxes(chunk[1].reshape(-1, PAGE, K, D), 1, 2)).max() > 0.01
    np.testing.assert_array_equal(np.asarray(state.memory.per_page["low"])[table], keys.min(axis=2))
    np.testing.assert_array_equal(np.asarray(state.memory.per_page["high"])[table], keys.max(axis=2))


def test_a_window_that_is_due_reads_everything_and_its_commit_renews_the_list(rng):
    """PillarAttn learns from the window that verifies a draft, as from a decode step."""
    policy = Pillar(budget=4, least=1, period=50)
    caches = [init_cache(CFG, SLOTS, CAPACITY, KVCache(page_size=PAGE), p) for p in (policy, Policy())]
    draw = lambda length, heads: rng.normal(size=(SLOTS, length, heads, D)).astype(np.float32)  # noqa: E731
    chunk = [draw(CHUNK, heads) for heads in (H, K, K)]
    lengths = [CHUNK, 5, 0]
    batch = PackedBatch.from_rows(np.zeros((SLOTS, CHUNK)), lengths=lengths)
    caches = [steps()[0](c, *chunk, batch, None, drafting=False)[1] for c in caches]
    nodes = [draw(W, heads) for heads in (H, K, K)]
    window = PackedBatch.from_rows(np.zeros((SLOTS, W)), offset=lengths)
    seen = [steps()[1](cache, *nodes, window) for cache in caches]
    np.testing.assert_allclose(seen[0][0], seen[1][0], atol=2e-5, rtol=2e-5)
    accepted = np.arange(W) < np.array([[3], [1], [0]])
    pillar = steps()[2](caches[0], seen[0][1], accepted)
    memory = pillar.layers[0].memory.per_slot
    np.testing.assert_array_equal(memory["next"], [CHUNK + 3 + 50, 6 + 50, 0])
    # The best of what was sealed, by the nodes' mean probability of what was stored before them.
    q, k = (np.asarray(x, np.float64) for x in (nodes[0], np.concatenate([chunk[1], nodes[1]], axis=1)))
    mass = np.zeros((K, CHUNK))
    for node in range(W):
        for head in range(H):
            scores = k[0, : CHUNK + node + 1, head // G] @ q[0, node, head] * D**-0.5
            weights = np.exp(scores - scores.max())
            mass[head // G] += (weights / weights.sum())[:CHUNK]
    count = int(memory["count"][0])
    assert count > 0
    for head in range(K):
        best = set(np.argsort(-mass[head])[:count] + 1)
        assert set(np.asarray(memory["chosen"])[0, head, :count].tolist()) == best


def test_a_first_chunk_gathers_no_page(rng, monkeypatch):
    """The same output and the same layer after it, over the tail and the chunk alone."""
    read = []

    def attention(q, k, v, **options):
        read.append(k.shape[2])
        return plain(q, k, v, **options)

    plain = paged_attention.attention
    monkeypatch.setattr(paged_attention, "attention", attention)
    (state,) = init_cache(CFG, 2, CAPACITY, KVCache("int8", PAGE)).opened()
    q, k, v = (jnp.asarray(rng.standard_normal((2, CHUNK, heads, D)), jnp.float32) for heads in (H, K, K))
    batch = PackedBatch.from_rows(np.zeros((2, CHUNK), np.int32))
    (want, after, _), (mine, then, _) = (
        attend.extend(state, q, k, v, batch, AttendOptions(fresh=fresh)) for fresh in (False, True)
    )
    assert read == [CAPACITY + state.layout.tail + CHUNK, state.layout.tail + CHUNK]
    np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, then, after)
