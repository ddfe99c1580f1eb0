"""SnapKV: what the end of a prompt looks at stays, the rest of the prompt goes (arXiv 2404.14469)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.cache.policies.base import Keep, Policy, PolicyState, Seen
from jaxllm.cache.policies.eviction import by_row, keep_best
from jaxllm.cache.policies.observation import POOLINGS, pool, query_ring, remember
from jaxllm.cache.view import Layout, View
from jaxllm.config import one_of, positive_fields, require
from pallas_kernels.precision import contract


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """At the end of a prompt of more than ``budget`` tokens every KV head keeps ``budget`` of them; all that follows stays.

    The prompt's last ``window`` tokens stay, and of those before them the ones to which the last ``window`` queries give
    most attention, summed over these queries, averaged over the query heads of the KV head and pooled along the keys.
    Defaults are those of the published code, which keeps a set for every query head where this one averages, so that
    a KV head is stored once.

    Attributes:
        budget: tokens of a prompt that stay.
        window: last queries that vote, and last tokens that always stay.
        kernel: width of the pooling; odd.
        pooling: "mean" (the published code) or "max" (its long-context experiments).

    Raises:
        ConfigError: a size below 1, ``window`` not below ``budget``, an even ``kernel`` or another ``pooling``.
    """

    budget: int = 2048
    window: int = 32
    kernel: int = 5
    pooling: str = "mean"

    evicts: ClassVar[bool] = True
    default_page_size: ClassVar[int | None] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_fields(self, "policy", "budget", "window", "kernel")
        require(self.window < self.budget, "policy.window", self.window, f"below budget={self.budget}")
        require(self.kernel % 2 == 1, "policy.kernel", self.kernel, "must be odd")
        one_of("policy.pooling", self.pooling, *POOLINGS)

    def stored(self, prompt: int, new: int) -> int:
        """What the prompt's end leaves, and the whole answer."""
        return min(prompt, self.budget) + new

    def init(self, layout: Layout) -> PolicyState:
        """The last ``window`` queries, f32[S, w, H, d], and the position of the last, i32[S]."""
        newest = jnp.zeros(layout.slots, jnp.int32)
        return PolicyState(per_slot={"queries": query_ring(layout, self.window), "newest": newest})

    def observe(self, state: PolicyState, view: View, seen: Seen) -> PolicyState:
        """Keep the step's queries."""
        ring = remember(state.per_slot["queries"], view.slots, seen)
        newest = state.per_slot["newest"].at[view.slots].max(jnp.max(seen.q_positions, axis=1), mode="drop")
        return PolicyState(per_slot={"queries": ring, "newest": newest})

    def triggers(self, state: PolicyState, view: View, ended: Bool[Array, " B"]) -> Bool[Array, " B"]:
        """Long prompts at their end."""
        return ended & (view.length > self.budget)

    def maintain(self, state: PolicyState, view: View, rows: Bool[Array, " B"]) -> tuple[PolicyState, Keep]:
        """What stays of the prompt."""

        def score(row: View) -> Float[Array, "K L"]:
            slot, keys, length = row.slots[0], row.keys()[0], row.length[0]
            last, newest = (state.per_slot[name].at[slot].get(mode="clip") for name in ("queries", "newest"))
            q = jnp.moveaxis(last.reshape(len(last), len(keys), -1, last.shape[-1]), 0, 2)
            # The ring is in the order of positions mod w; a query sees the tokens up to its own.
            number = length - 1 - (newest - jnp.arange(self.window)) % self.window
            scores = contract("kgwd,kld->kgwl", q, keys) * row.scale
            scores = jnp.where(jnp.arange(keys.shape[1]) <= number[:, None], scores, -jnp.inf)
            votes = jnp.mean(jnp.sum(jax.nn.softmax(scores, axis=-1), axis=2), axis=1)
            return pool(votes, self.kernel, self.pooling, length - self.window)

        return state, keep_best(by_row(view, rows, score), view.length, self.budget, self.window)
