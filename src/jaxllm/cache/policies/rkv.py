"""R-KV: keep what the last queries look at and what no other key repeats (arXiv 2505.24133).

Of the three versions that its authors published this is the one of their code: scores of a group's query heads are
merged by their maximum before one softmax, the observation tokens take part in the similarities, and redundancy is the
mean over a *column*, the similarity that other keys have to this one. Every key forgives the most recent of the keys
that resemble it, so that of a group of repetitions the newest stays; the mean over a row, which the paper's Algorithm 1
writes, would drop it first.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache.policies.base import Keep, Policy, PolicyState, Seen
from jaxllm.cache.policies.eviction import by_row, keep_best
from jaxllm.cache.policies.observation import pool, query_ring, remember
from jaxllm.cache.view import Layout, View
from jaxllm.config import positive_fields, require
from pallas_kernels.precision import contract

# Rows of the similarity matrix that exist at once.
_TILE = 128


@dataclass(frozen=True, kw_only=True)
class RKV(Policy):
    """At most ``budget + buffer`` tokens, whatever the length of the answer.

    Whenever ``budget + buffer`` tokens are stored, and at the end of a prompt of more than ``budget``, every KV head
    keeps its last ``window`` tokens and the best ``budget - window`` others by ``mix * importance - (1 - mix) *
    redundancy``. Defaults are the published ones.

    Attributes:
        budget: tokens that an eviction leaves.
        buffer: tokens that gather before the next.
        window: last queries that judge importance, and last tokens that always stay.
        kernel: width of the max-pool over importance; odd.
        threshold: cosine above which two keys resemble each other.
        mix: lambda, weight of importance; 1 ignores redundancy, 0 the queries.

    Raises:
        ConfigError: a size below 1, ``window`` not below ``budget``, an even ``kernel``, ``threshold`` outside [0, 1)
            or ``mix`` outside [0, 1].
    """

    budget: int = 1024
    buffer: int = 128
    window: int = 8
    kernel: int = 7
    threshold: float = 0.5
    mix: float = 0.1

    evicts: ClassVar[bool] = True
    default_page_size: ClassVar[int | None] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_fields(self, "policy", "budget", "buffer", "window", "kernel")
        require(self.window < self.budget, "policy.window", self.window, f"below budget={self.budget}")
        require(self.kernel % 2 == 1, "policy.kernel", self.kernel, "must be odd")
        # Below 0 a key would forgive itself or the padding.
        require(0 <= self.threshold < 1, "policy.threshold", self.threshold, "0 or more, below 1")
        require(0 <= self.mix <= 1, "policy.mix", self.mix, "0 to 1")

    def stored(self, prompt: int, new: int) -> int:
        """Tokens gather up to ``budget + buffer`` on what the prompt's end leaves."""
        return min(min(prompt, self.budget) + new, self.budget + self.buffer)

    def init(self, layout: Layout) -> PolicyState:
        """The ring of the last ``window`` queries: f32[S, w, H, d]."""
        return PolicyState(per_slot={"queries": query_ring(layout, self.window)})

    def observe(self, state: PolicyState, view: View, seen: Seen) -> PolicyState:
        """Keep the step's queries."""
        return PolicyState(per_slot={"queries": remember(state.per_slot["queries"], view.slots, seen)})

    def triggers(self, state: PolicyState, view: View, ended: Bool[Array, " B"]) -> Bool[Array, " B"]:
        """Rows whose buffer is full, and long prompts at their end."""
        return (view.length >= self.budget + self.buffer) | (ended & (view.length > self.budget))

    def maintain(self, state: PolicyState, view: View, rows: Bool[Array, " B"]) -> tuple[PolicyState, Keep]:
        """What stays. Queries are indexed by position and stay as they are."""
        ring = state.per_slot["queries"]

        def score(row: View) -> Float[Array, "K L"]:
            keys, length = row.keys()[0], row.length[0]
            last = ring.at[row.slots[0]].get(mode="clip")
            q = jnp.moveaxis(last.reshape(len(last), len(keys), -1, last.shape[-1]), 0, 2)
            looked_at = importance(q, keys, length, row.scale, self.kernel)
            return self.mix * looked_at - (1 - self.mix) * redundancy(keys, length, self.threshold)

        return state, keep_best(by_row(view, rows, score), view.length, self.budget, self.window)


def importance(
    q: Float[Array, "K G w d"], keys: Float[Array, "K L d"], length: Int[Array, ""], scale: float, kernel: int
) -> Float[Array, "K L"]:
    """Mean attention of w queries to the tokens before the last w, max-pooled; 0 for all other tokens.

    Args:
        q: last queries of every head; their order does not matter.
        keys: by number, ``length`` of them stored.
        length: stored tokens.
        scale: factor of the scores.
        kernel: width of the max-pool.
    """
    candidates = length - q.shape[2]
    scores = jnp.max(contract("kgwd,kld->kgwl", q, keys), axis=1) * scale
    scores = jnp.where(jnp.arange(keys.shape[1]) < candidates, scores, jnp.finfo(jnp.float32).min)
    return pool(jnp.mean(jax.nn.softmax(scores, axis=-1), axis=1), kernel, "max", candidates)


def redundancy(
    keys: Float[Array, "K L d"], length: Int[Array, ""], threshold: float, tile: int = _TILE
) -> Float[Array, "K L"]:
    """Softmax over stored tokens of the mean similarity that other keys have to each; 0 past the length.

    A key forgives the most recent of the keys whose cosine to it is above ``threshold``; token 0 where none is.

    Args:
        keys: by number, 0 past the length.
        length: stored tokens.
        threshold: not negative.
        tile: rows of the similarity matrix, [K, tile, L], that exist at once.
    """
    heads, tokens = keys.shape[:2]
    unit = keys / (jnp.linalg.norm(keys, axis=-1, keepdims=True) + 1e-8)
    padded = jnp.pad(unit, ((0, 0), (0, -tokens % tile), (0, 0)))
    column = jnp.arange(tokens)

    def add(i, total):
        similarity = contract("krd,kld->krl", lax.dynamic_slice_in_dim(padded, i * tile, tile, 1), unit)
        itself = column == i * tile + jnp.arange(tile)[:, None]
        similarity = jnp.where(itself, 0, similarity)
        forgiven = jnp.max(jnp.where(similarity > threshold, column, 0), axis=-1, keepdims=True)
        return total + jnp.sum(jnp.where(column == forgiven, 0, similarity), axis=1)

    total = lax.fori_loop(0, -(-length // tile), add, jnp.zeros((heads, tokens), jnp.float32))
    mean = jnp.where(column < length, total / length, -jnp.inf)
    return jax.nn.softmax(mean, axis=-1)
