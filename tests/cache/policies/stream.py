"""Rows of stored tokens kept in numpy, and exact attention over them: what tests of policies put in place of a cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.cache.policies.base import Keep, Policy, Seen
from jaxllm.cache.view import Layout, View
from tests.cache.policies.views import view


@functools.cache
def jitted(policy: Policy, verb: str) -> Callable[..., Any]:
    """The compiled verb of a policy."""
    return jax.jit(getattr(policy, verb))


def probabilities(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """f64[H, n]: attention of one token's query heads q [H, d] over keys k [K, n, d]."""
    group = len(q) // len(k)
    scores = np.stack(
        [scale * k[h // group].astype(np.float64) @ q[h].astype(np.float64) for h in range(len(q))]
    )
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


class Stream:
    """B rows in slots 0 .. B - 1; every token has an identity that survives evictions."""

    def __init__(self, sizes: Layout, rows: int, rng: np.random.Generator):
        self.sizes, self.rng = sizes, rng
        self.k = [np.zeros((sizes.kv_heads, 0, sizes.head_dim), np.float32) for _ in range(rows)]
        self.v = list(self.k)
        self.ids = [np.zeros((sizes.kv_heads, 0), np.int64) for _ in range(rows)]
        self.seen = [0] * rows

    @property
    def lengths(self) -> list[int]:
        return [k.shape[1] for k in self.k]

    def view(self, bits: int | None = None, sealed: list[int] | None = None) -> View:
        both = []
        for stored in (self.k, self.v):
            room = self.sizes.tokens
            both.append(np.stack([np.pad(x, ((0, 0), (0, room - x.shape[1]), (0, 0))) for x in stored]))
        return view(self.sizes, *both, self.lengths, self.rng, bits, sealed)

    def append(
        self, new: list[int], k: list[np.ndarray] | None = None, width: int = 1
    ) -> tuple[np.ndarray, Seen]:
        """``new[row]`` tokens more: random queries f32[B, T, H, d], NaN where padded, and what exact attention has seen.

        T is ``width``, or more where a row needs it.
        """
        s, T = self.sizes, max(width, *new)
        heads = s.kv_heads * s.group
        q = np.full((len(new), T, heads, s.head_dim), np.nan, np.float32)
        positions, tokens = np.full((2, len(new), T), -1, np.int32)
        lse = np.full((len(new), T, heads), np.nan, np.float32)
        mass = np.zeros((len(new), s.kv_heads, s.tokens))
        for row, n in enumerate(new):
            shape = (s.kv_heads, n, s.head_dim)
            keys = self.rng.normal(size=shape) if k is None else k[row]
            self.k[row] = np.concatenate([self.k[row], keys.astype(np.float32)], axis=1)
            self.v[row] = np.concatenate(
                [self.v[row], self.rng.normal(size=shape).astype(np.float32)], axis=1
            )
            ids = np.arange(self.seen[row], self.seen[row] + n)
            self.ids[row] = np.concatenate([self.ids[row], np.tile(ids, (s.kv_heads, 1))], axis=1)
            self.seen[row] += n
            q[row, :n] = 2 * self.rng.normal(size=(n, heads, s.head_dim))
            positions[row, :n] = ids
            tokens[row, :n] = np.arange(self.k[row].shape[1] - n, self.k[row].shape[1])
            for t in range(n):
                visible = self.k[row][:, : tokens[row, t] + 1].astype(np.float64)
                p = probabilities(q[row, t], visible, s.scale)
                first = np.einsum(
                    "hd,hd->h", q[row, t].astype(np.float64), visible[np.arange(heads) // s.group, 0]
                )
                lse[row, t] = s.scale * first - np.log(p[:, 0])
                mean = p.reshape(s.kv_heads, s.group, -1).mean(axis=1)
                mass[row, :, : mean.shape[1]] += mean / n
        # What is not stored has no probability.
        for row, n in enumerate(self.lengths):
            mass[row, :, n:] = np.nan
        arrays: list[Any] = [jnp.asarray(x) for x in (q, positions, tokens, lse, mass.astype(np.float32))]
        return q, Seen(*arrays)

    def evict(self, keep: Keep, rows: np.ndarray) -> None:
        """What a cache does with what ``maintain`` returns."""
        for row in np.flatnonzero(rows):
            kept = np.asarray(keep.tokens)[row, :, : int(keep.count[row])]
            for stored in (self.k, self.v):
                stored[row] = np.take_along_axis(stored[row], kept[..., None], axis=1)
            self.ids[row] = np.take_along_axis(self.ids[row], kept, axis=1)
