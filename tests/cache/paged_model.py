"""A plain model of a paged layer: every slot a list of tokens, pages rounded when they are full, float64 attention."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.cache.policies.base import Keep, Policy, PolicyState, Selection
from pallas_kernels.paged_attention import dequantize_pages, quantize_pages

PAGE, K, G, D = 4, 2, 2, 8


@dataclass(frozen=True, kw_only=True)
class OddPages(Policy):
    """Reads pages 1, 3, 5, ... alone where an even number of tokens is stored, else pages 0, 2, 4, ..."""

    def select(self, state, q, view):
        index, first = jnp.arange(view.table.shape[1]), 1 - view.length % 2
        count = (view.sealed // view.page + 1 - first) // 2
        logical = jnp.where(index < count[:, None], 2 * index + first[:, None], -1).astype(jnp.int32)
        logical = jnp.broadcast_to(logical[:, None], (len(logical), K, logical.shape[1]))
        return Selection(logical, jnp.broadcast_to(count[:, None], logical.shape[:2]))


@dataclass(frozen=True, kw_only=True)
class Ends(Policy):
    """Keeps the first ``head`` and last ``recent`` tokens when ``most`` are stored; counts the queries that it sees."""

    head: int = 3
    recent: int = 6
    most: int = 13
    evicts = True

    def init(self, layout):
        return PolicyState(per_slot={"queries": jnp.zeros(layout.slots, jnp.int32)})

    def observe(self, state, view, seen):
        real = (seen.q_positions >= 0) & (seen.q_tokens >= 0)
        padding = (seen.q_positions < 0) & (seen.q_tokens < 0)
        # Both say the same, and positions only grow.
        count = jnp.where(jnp.all(real | padding, axis=1), jnp.sum(real, axis=1), 1000)
        queries = state.per_slot["queries"].at[view.slots].add(count, mode="drop")
        return PolicyState(per_slot={"queries": queries})

    def triggers(self, state, view, ended):
        return (view.length >= self.most) | (ended & (view.length > self.head + self.recent))

    def maintain(self, state, view, rows):
        m = self.head + self.recent
        index = jnp.arange(m)
        tokens = jnp.where(index < self.head, index, view.length[:, None] - m + index)
        tokens = jnp.broadcast_to(tokens[:, None], (len(rows), K, m)).astype(jnp.int32)
        return state, Keep(tokens, jnp.full(len(rows), m))


def rounded(tokens: list[np.ndarray], bits: int | None, per_channel: bool, dtype: Any) -> list[np.ndarray]:
    """A full page of tokens [K, d] as the pool keeps them."""
    page = jnp.asarray(np.stack(tokens, axis=1)[None])
    if bits is None:
        page = page.astype(dtype).astype(jnp.float32)
    else:
        page = dequantize_pages(quantize_pages(page, bits=bits, per_channel=per_channel))
    return list(np.moveaxis(np.asarray(page)[0], 1, 0))


@dataclass
class Slot:
    """What one slot stores."""

    k: list[np.ndarray]
    v: list[np.ndarray]
    sealed: int = 0

    def seal(self, bits: int | None, keys_per_channel: bool, dtype: Any) -> None:
        """Round the pages that are full."""
        while self.sealed + PAGE <= len(self.k):
            part = slice(self.sealed, self.sealed + PAGE)
            self.k[part] = rounded(self.k[part], bits, keys_per_channel, dtype)
            self.v[part] = rounded(self.v[part], bits, False, dtype)
            self.sealed += PAGE

    def keep(self, tokens: list[int]) -> None:
        """Only these tokens stay; their pages are written anew."""
        self.k, self.v = [self.k[i] for i in tokens], [self.v[i] for i in tokens]
        self.sealed = 0

    def attend(self, q: np.ndarray, tokens: list[int]) -> np.ndarray:
        """[H, d] of queries [H, d] over some of the tokens."""
        if not tokens:
            return np.zeros_like(q)
        k, v = (np.stack([side[i] for i in tokens]).astype(np.float64) for side in (self.k, self.v))
        out = []
        for head, query in enumerate(q.astype(np.float64)):
            scores = k[:, head // G] @ query * D**-0.5
            weights = np.exp(scores - scores.max())
            out.append(weights @ v[:, head // G] / weights.sum())
        return np.stack(out)
