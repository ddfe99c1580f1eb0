"""A window's nodes are ``extend`` over their paths; a commit leaves what running the accepted tokens leaves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.batch import PackedBatch
from jaxllm.cache.kv import KVCache
from jaxllm.cache.state import init_cache
from jaxllm.config import Precision
from tests.kernels.tree_cases import path_to, random_parents
from tests.model.window_cases import (
    CAPACITY,
    MODELS,
    ROWS,
    SLOTS,
    VOCAB,
    W,
    assert_caches_close,
    assert_caches_equal,
    chunk,
    filled,
    steps,
)

# Model, page size, and if the rows name their slots.
CASES = [
    ("mixed", None, False),
    ("mixed", 4, True),
    ("mamba", None, True),
    ("delta", None, True),
    ("attention", 8, False),
]
SEEDS = st.integers(0, 2**31 - 1)
TOLERANCE = 1e-5


class Window:
    """Random trees, some nodes padding, over ROWS slots that hold 0 to 12 tokens."""

    def __init__(
        self, name: str, seed: int, *, page: int | None = None, named: bool = False, chain: bool = False
    ):
        rng = np.random.default_rng(seed)
        self.cfg = MODELS[name]
        self.starts = rng.integers(0, 13, ROWS)
        slots = rng.permutation(SLOTS)[:ROWS, None].astype(np.int32)
        self.slots = slots if named else None
        self.cache = filled(self.cfg, rng, self.starts.tolist(), self.slots, KVCache(page_size=page))
        self.parents = None if chain else random_parents(rng, ROWS, W, shuffled=bool(rng.random() < 0.5))
        inside = rng.random((ROWS, W)) < 0.85
        # extend takes padding before and behind a document only.
        span = np.arange(W) < rng.integers(1, W + 1, (ROWS, 1))
        self.live = np.roll(span, rng.integers(0, 2), axis=1) if chain else inside
        self.tokens = rng.integers(0, VOCAB, (ROWS, W)).astype(np.int32)
        depth = [[len(self.path(b, i)) - 1 for i in range(W)] for b in range(ROWS)]
        positions = np.where(self.live, self.starts[:, None] + depth, rng.integers(0, CAPACITY, (ROWS, W)))
        self.batch = PackedBatch(
            self.tokens,
            self.live.astype(np.int32),
            positions.astype(np.int32),
            slots=self.slots,
            parents=self.parents,
        )

    def path(self, row: int, node: int) -> list[int]:
        """Live nodes from the top down to ``node``."""
        return path_to(None if self.parents is None else self.parents[row], self.live[row], node)

    def extend(self, paths: list[list[int]]):
        """``extend`` over one path for each row, its tokens in one chunk: (logits, cache)."""
        pieces = [self.tokens[row, path].tolist() for row, path in enumerate(paths)]
        return steps(self.cfg)[0](chunk(pieces, self.starts, self.slots), self.cache)


def check_nodes(w: Window, logits) -> None:
    for node in range(W):
        paths = [w.path(row, node) for row in range(ROWS)]
        expected, _ = w.extend(paths)
        for row in np.flatnonzero(w.live[:, node]):
            np.testing.assert_allclose(
                logits[row, node], expected[row, len(paths[row]) - 1], rtol=TOLERANCE, atol=TOLERANCE
            )


@pytest.mark.parametrize(("name", "page", "named"), CASES)
@settings(max_examples=6)
@given(seed=SEEDS)
def test_every_node_is_extend_over_its_path_and_the_cache_stays(name, page, named, seed):
    w = Window(name, seed, page=page, named=named)
    logits, window = steps(w.cfg)[1](w.batch, w.cache)
    check_nodes(w, logits)
    for layer, state in zip(window.layers, w.cache.opened(), strict=True):
        assert layer is None or (assert_caches_equal(layer.state, state) is None)


@pytest.mark.parametrize(("name", "page", "named"), CASES)
@settings(max_examples=4)
@given(seed=SEEDS)
def test_committing_m_tokens_is_having_run_m(name, page, named, seed):
    """Every m from 0 to the longest path, another one in each row; every leaf of every slot."""
    w = Window(name, seed, page=page, named=named)
    _, window = steps(w.cfg)[1](w.batch, w.cache)
    longest = [max((w.path(row, node) for node in range(W)), key=len) for row in range(ROWS)]
    path = np.random.default_rng(seed).integers(-1, W + 1, (ROWS, W))
    for row, nodes in enumerate(longest):
        path[row, : len(nodes)] = nodes
    for m in range(W + 1):
        n = np.array([(m + row) % (len(nodes) + 1) for row, nodes in enumerate(longest)])
        after = steps(w.cfg)[2](window, jnp.asarray(path), jnp.asarray(n))
        _, expected = w.extend([nodes[:k] for nodes, k in zip(longest, n)])
        assert_caches_close(after, expected, TOLERANCE)


def test_committing_nothing_leaves_every_bit():
    w = Window("mixed", 1)
    _, window = steps(w.cfg)[1](w.batch, w.cache)
    path = jnp.tile(jnp.arange(W), (ROWS, 1))
    assert_caches_equal(steps(w.cfg)[2](window, path, jnp.zeros(ROWS, jnp.int32)), w.cache)
    _, window = steps(w.cfg)[1](replace(w.batch, segment_ids=np.zeros((ROWS, W), np.int32)), w.cache)
    assert_caches_equal(steps(w.cfg)[2](window, path, jnp.full(ROWS, W)), w.cache)


@settings(max_examples=6)
@given(seed=SEEDS)
def test_a_chain_needs_no_parents_and_padding_on_a_path_is_passed_over(seed):
    """The committed path names every node of the row, padding too."""
    w = Window("mixed", seed, chain=True)
    extend, window_step, commit = steps(w.cfg)
    logits, window = window_step(w.batch, w.cache)
    expected, cache = extend(replace(w.batch, parents=None), w.cache)
    np.testing.assert_allclose(logits[w.live], expected[w.live], rtol=TOLERANCE, atol=TOLERANCE)
    after = commit(window, jnp.tile(jnp.arange(W), (ROWS, 1)), jnp.full(ROWS, W))
    assert_caches_close(after, cache, TOLERANCE)


def test_what_padding_holds_reaches_nobody():
    w = Window("mixed", 7)
    assert not w.live.all()
    other = replace(
        w.batch,
        tokens=np.where(w.live, w.tokens, 0),
        positions=np.where(w.live, w.batch.positions, CAPACITY - 1).astype(np.int32),
    )
    logits, again = (np.asarray(steps(w.cfg)[1](batch, w.cache)[0]) for batch in (w.batch, other))
    np.testing.assert_array_equal(logits[w.live], again[w.live])


def test_rows_without_a_slot_start_from_nothing_and_keep_nothing():
    w = Window("mixed", 3)
    slots = np.array([[2], [-1], [0]], np.int32)
    positions = np.where(w.live, w.batch.positions - w.starts[:, None], 0).astype(np.int32)
    batch = replace(w.batch, slots=slots, positions=positions)
    w.starts = np.zeros(ROWS, int)
    w.cache = filled(w.cfg, np.random.default_rng(0), [0, 0, 0], slots)
    logits, window = steps(w.cfg)[1](batch, w.cache)
    after = steps(w.cfg)[2](window, jnp.zeros((ROWS, W), jnp.int32), jnp.array([0, 1, 0]))
    assert_caches_equal(after, w.cache)
    w.slots = np.array([[2], [1], [0]], np.int32)
    w.cache = filled(w.cfg, np.random.default_rng(0), [0, 0, 0], w.slots)
    check_nodes(w, logits)


@pytest.mark.parametrize("page", [None, 4])
def test_keys_past_the_capacity_are_dropped(page):
    """Nodes within the capacity are right, may be committed, and the overflowing ones reach no other slot."""
    w = Window("attention", 5, page=page, chain=True)
    room = 2
    w.starts = np.array([CAPACITY - room, 3, CAPACITY - W])
    w.live[:] = True
    _, window_step, commit = steps(w.cfg)
    w.cache = filled(w.cfg, np.random.default_rng(5), w.starts.tolist(), None, KVCache(page_size=page))
    batch = PackedBatch.from_rows(w.tokens, offset=w.starts)
    logits, window = window_step(batch, w.cache)
    for node in range(room):
        paths = [list(range(node + 1))] * ROWS
        expected, _ = w.extend(paths)
        np.testing.assert_allclose(logits[:, node], expected[:, node], rtol=TOLERANCE, atol=TOLERANCE)
    path = jnp.tile(jnp.arange(W), (ROWS, 1))
    whole = commit(window, path, jnp.array([W, 0, 0]))
    fitting = commit(window, path, jnp.array([room, 0, 0]))
    assert_caches_equal(whole, fitting)
    assert_caches_close(fitting, w.extend([[0, 1], [], []])[1], TOLERANCE)


def test_from_rows_counts_positions_by_depth():
    parents = np.array([[-1, 0, 0, 2, -1, 4], [-1, 0, 1, 2, 3, 4]], np.int32)
    batch = PackedBatch.from_rows(np.ones((2, W)), parents=parents, offset=[5, 0], lengths=[6, 4])
    np.testing.assert_array_equal(batch.positions[0], [5, 6, 6, 7, 5, 6])
    np.testing.assert_array_equal(batch.positions[1, :4], [0, 1, 2, 3])
    np.testing.assert_array_equal(batch.segment_ids[1], [1, 1, 1, 1, 0, 0])


def test_the_reference_kernels_and_a_read_bound_give_the_same():
    w = Window("mixed", 11)
    logits, window = steps(w.cfg)[1](w.batch, w.cache)
    # The bound has to reach the committed tokens, not the window's.
    for options in ((int(w.starts.max()), "auto"), (None, "reference")):
        other, theirs = steps(w.cfg, *options)[1](w.batch, w.cache)
        np.testing.assert_allclose(other[w.live], logits[w.live], rtol=TOLERANCE, atol=TOLERANCE)
        assert_caches_close(theirs, window)


@pytest.mark.parametrize(
    ("precision", "kv", "implementation", "tolerance"),
    [
        (Precision(compute="bfloat16"), "compute", "auto", 0.05),
        (Precision(), "bfloat16", "auto", 5e-3),
        # It alone does not round the products: what is left is the rounding of the keys, which has to be the pools'.
        (Precision(), "bfloat16", "reference", TOLERANCE),
    ],
)
def test_rounded_windows_follow_extend(precision, kv, implementation, tolerance):
    w = Window("mixed", 13, chain=True)
    w.cfg = w.cfg.replace(pattern="M*", precision=precision)
    w.cache = filled(w.cfg, np.random.default_rng(0), w.starts.tolist(), w.slots, KVCache(dtype=kv))
    extend, window_step, commit = steps(w.cfg, None, implementation)
    logits, window = window_step(w.batch, w.cache)
    expected, cache = extend(w.batch, w.cache)
    scale = max(1, np.abs(expected[w.live]).max())
    np.testing.assert_allclose(logits[w.live], expected[w.live], rtol=0, atol=tolerance * scale)
    assert window.layers[1].k.dtype == jnp.bfloat16
    after = commit(window, jnp.tile(jnp.arange(W), (ROWS, 1)), jnp.full(ROWS, W))
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(cache)]
    following = chunk([[1]] * ROWS, w.starts + w.live.sum(axis=1), w.slots)
    got, wanted = (extend(following, each)[0][:, 0] for each in (after, cache))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": np.zeros((ROWS, W - 1), np.int32)}, "batch.parents.shape"),
        ({"slots": np.zeros((ROWS, 2), np.int32)}, "batch.slots.shape"),
    ],
)
def test_what_is_no_window_is_refused(change, message):
    cfg = MODELS["mixed"]
    batch = replace(PackedBatch.from_rows(np.ones((ROWS, W))), **change)
    with pytest.raises(ValueError, match=message):
        steps(cfg)[1](batch, init_cache(cfg, SLOTS, CAPACITY))
