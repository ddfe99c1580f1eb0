"""Trees of tokens for the window tests, and their paths by plain pointer chasing."""

import numpy as np


def random_parents(rng: np.random.Generator, rows: int, W: int, shuffled: bool = False) -> np.ndarray:
    """Parents i32[rows, W], -1 for the prefix; shallow and deep trees, forests; ``shuffled``: children before parents too."""
    depth_first = rng.random((rows, 1)) < 0.4
    drawn = np.where(
        depth_first,
        np.arange(W) - 1 - (rng.random((rows, W)) < 0.2),
        rng.integers(-1, np.arange(W), (rows, W)),
    )
    parents = np.maximum(drawn, -1).astype(np.int32)
    if shuffled:
        for row in parents:
            order = rng.permutation(W)
            moved = np.full(W, -1, np.int32)
            moved[order] = np.where(row < 0, -1, order[np.maximum(row, 0)])
            row[:] = moved
    return parents


def path_to(parents: np.ndarray | None, live: np.ndarray, node: int) -> list[int]:
    """The live nodes from the prefix down to ``node`` of one row; padding is passed over."""
    path = []
    while node >= 0:
        if live[node]:
            path.append(node)
        node = node - 1 if parents is None else int(parents[node])
    return path[::-1]
