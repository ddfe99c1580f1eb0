"""K-means: each round is a round of Lloyd's, whatever the row's place, room or tiles."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.cache.policies import kmeans
from jaxllm.cache.policies.kmeans import Clusters


@partial(jax.jit, static_argnames="most")
def run(keys, there, count, *, most: int = 9, rounds: int = 10, seed: int = 0) -> Clusters:
    return kmeans.cluster(keys, there, count, most=most, rounds=rounds, seed=seed)


def drawn(rng: np.random.Generator, N: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Keys of two heads in blobs, of which some tokens at both ends are not there."""
    keys = rng.normal(size=(2, 5, 3))[:, rng.integers(0, 5, N)] + 0.4 * rng.normal(size=(2, N, 3))
    return keys.astype(np.float32), (np.arange(N) >= 4) & (np.arange(N) < N - 3)


def owners(found: Clusters, head: int) -> np.ndarray:
    """The cluster of each token, -1 for none, from sizes and members."""
    size, members = np.asarray(found.size)[head], np.asarray(found.members)[head]
    owner = np.full(len(members), -1)
    owner[members[: size.sum()]] = np.repeat(np.arange(len(size)), size)
    return owner


def test_each_round_assigns_to_the_nearest_and_moves_to_the_mean(seed: int):
    keys, there = drawn(np.random.default_rng(seed))
    rounds = [run(keys, there, 7, rounds=r) for r in range(1, 8)]
    losses, placed = [], []
    for before, after in zip([None, *rounds], rounds, strict=False):
        loss = 0.0
        for head in range(2):
            k, owner = keys[head].astype(np.float64), owners(after, head)
            np.testing.assert_array_equal(owner >= 0, there)
            members = np.asarray(after.members)[head]
            np.testing.assert_array_equal(np.sort(members), np.arange(40))
            for c in range(9):
                mine = k[owner == c]
                assert after.size[head, c] == len(mine)
                if len(mine):
                    np.testing.assert_allclose(after.centroids[head, c], mine.mean(0), atol=1e-5)
                    loss += np.sum((mine - mine.mean(0)) ** 2)
            if before is not None:
                far = np.sum((k[:, None] - np.asarray(before.centroids, np.float64)[head, :7]) ** 2, axis=-1)
                chosen = far[np.arange(40), owner][there]
                np.testing.assert_allclose(chosen, far.min(1)[there], atol=1e-5)
        losses.append(loss)
        placed.append([owners(after, head) for head in range(2)])
    # A draw may start where nothing has anywhere nearer to go; a round that moves tokens lowers the loss.
    moved = [not np.array_equal(old, new) for old, new in itertools.pairwise(placed)]
    assert np.all(np.diff(losses) <= 1e-6) and (not any(moved) or losses[-1] < losses[0])


def test_clusters_start_from_distinct_tokens_that_are_there(seed: int):
    keys, there = drawn(np.random.default_rng(seed))
    for count in (1, 9, 33):
        found = run(keys, there, count, most=40, rounds=1)
        # Each start is nearest to itself, and nothing else starts there.
        assert np.all(np.asarray(found.size)[:, :count] >= 1) and not np.any(found.size[:, count:])
    starts = [run(keys, there, 9, seed=s).centroids for s in (0, 0, 1)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert np.abs(np.asarray(starts[0] - starts[2])).max() > 0.1


def test_the_draw_is_uniform():
    """Over many seeds a cluster starts from each of 8 tokens about as often."""
    keys, there = jnp.arange(10.0).reshape(1, 10, 1), jnp.arange(10) >= 2
    starts = jax.vmap(lambda s: run(keys, there, 1, rounds=0, seed=s).centroids[0, 0, 0])(jnp.arange(800))
    counts = np.bincount(np.asarray(starts, np.int32), minlength=10)
    assert not counts[:2].any() and np.all(counts[2:] > 60) and np.all(counts[2:] < 140)


def test_room_and_tiles_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch):
    keys, there = drawn(np.random.default_rng(seed))
    plain = run(keys, there, 6)
    wide = run(np.pad(keys, ((0, 0), (0, 11), (0, 0))), np.pad(there, (0, 11)), 6, most=20)
    monkeypatch.setattr(kmeans, "_TILE", 16)
    tiled = kmeans.cluster(jnp.asarray(keys), jnp.asarray(there), jnp.int32(6), most=9, rounds=10, seed=0)
    for head in range(2):
        np.testing.assert_array_equal(owners(tiled, head), owners(plain, head))
        np.testing.assert_array_equal(owners(wide, head)[:40], owners(plain, head))
    np.testing.assert_array_equal(wide.centroids[:, :6], plain.centroids[:, :6])


def test_equal_keys_leave_clusters_empty_but_sound():
    keys, there = np.ones((1, 12, 3), np.float32), np.ones(12, bool)
    found = run(keys, there, 4)
    assert found.size.tolist() == [[12, *[0] * 8]] and sorted(found.members[0].tolist()) == list(range(12))
    np.testing.assert_array_equal(found.centroids[0, :4], np.ones((4, 3)))


def test_nothing_to_cluster_gives_empty_clusters():
    keys = np.ones((1, 12, 3), np.float32)
    found = run(keys, np.zeros(12, bool), 0)
    assert not found.size.any() and np.all(np.isfinite(found.centroids))
