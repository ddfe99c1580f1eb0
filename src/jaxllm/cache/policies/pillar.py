"""PillarAttn: a step of full attention now and then says which tokens the next ones read (SparseSpec, arXiv 2512.01278)."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache.policies.base import Policy, PolicyState, Seen, Selection
from jaxllm.cache.view import Layout, View
from jaxllm.config import positive_fields, require

# Shares are ratios of integers up to this, so that counts are exact on the device in 32 bits up to 2 M tokens.
_DENOMINATOR = 1024


@dataclass(frozen=True, kw_only=True)
class Pillar(Policy):
    """Every ``period`` tokens a row reads everything; in between the tokens that scored best then, and all newer ones.

    The score of a token is its probability in the full step, averaged over the step's queries and the query heads of its
    KV head. Of the tokens sealed then, each KV head keeps the list of the best; what was in the open tail then, and all
    that came since, is read as well. List and tail together are ``budget`` of what was stored then. Rows begin with a
    full step after their prompt, and each has its own phase. Nothing is evicted.

    To count what a row reads, ask :meth:`due` before each step: a due row reads ``view.length`` tokens of every KV head,
    and their keys once more where the probabilities come from a second pass over them; any other ``Selection.count +
    view.tail_len``.

    Attributes:
        budget: tokens read, a number or a share of the stored ones (to 1/1024 at the finest).
        least: tokens read at least, where there are as many.
        period: a full step every so many tokens; 1 is dense attention.

    Raises:
        ConfigError: a share outside 1/1024 to 1, or a number below 1.
    """

    budget: int | float = 0.05
    least: int = 128
    period: int = 8

    granularity: ClassVar[str] = "token"
    # The first list is made by the first decode step.
    rebuilds: ClassVar[bool] = True
    default_page_size: ClassVar[int | None] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.budget, int):
            positive_fields(self, "policy", "budget")
        else:
            require(
                1 / _DENOMINATOR <= self.budget <= 1,
                "policy.budget",
                self.budget,
                "a number of tokens, or a share from 1/1024 to 1",
            )
        positive_fields(self, "policy", "least", "period")

    def init(self, layout: Layout) -> PolicyState:
        """The list of every slot.

        ``chosen`` i32[S, K, m]: token numbers plus one, ``count`` i32[S] of them; ``since`` i32[S]: tokens from this
        number on are read whole; ``next`` i32[S]: stored tokens at which the next full step comes.
        """
        most = self._most(layout)
        none = jnp.zeros(layout.slots, jnp.int32)
        chosen = jnp.zeros((layout.slots, layout.kv_heads, most), jnp.int32)
        return PolicyState(per_slot={"chosen": chosen, "count": none, "since": none, "next": none})

    def step_bytes(self, layout: Layout, sealed: Any, key: int) -> Any:
        """The list, and how long it is."""
        return layout.kv_heads * self._most(layout) * 4 + 0 * sealed

    def due(self, state: PolicyState, view: View) -> Bool[Array, " B"]:
        """Rows whose period is over, or that have no list yet."""
        slots = state.per_slot["next"].shape[0]
        return (view.slots < slots) & (view.length >= self._of("next", state, view))

    def select(self, state: PolicyState, q: Float[Array, "B W H d"], view: View) -> Selection:
        """The list, then what was sealed since; without meaning for rows that are ``due``."""
        chosen, count, since = (self._of(name, state, view) for name in ("chosen", "count", "since"))
        # All that can be sealed between two full steps: a full tail, and what is appended.
        newer = (view.tail_k.shape[2] + self.period - 1) // view.page * view.page
        at = jnp.arange(chosen.shape[2] + newer)
        count, since = count[:, None, None], since[:, None, None]
        all_ = count + jnp.clip(view.sealed[:, None, None] - since, 0, newer)
        listed = jnp.pad(chosen, ((0, 0), (0, 0), (0, newer))) - 1
        logical = jnp.where(at < count, listed, since + at - count)
        return Selection(jnp.where(at < all_, logical, -1), jnp.broadcast_to(all_[..., 0], chosen.shape[:2]))

    def observe(self, state: PolicyState, view: View, seen: Seen) -> PolicyState:
        """After a full step of a row: its new list."""
        if seen.mass is None:
            return state
        old = state.per_slot
        number, since = jnp.arange(view.tokens), view.sealed
        scores = jnp.where(number < since[:, None, None], seen.mass, -jnp.inf)
        most = old["chosen"].shape[2]
        _, best = lax.top_k(scores, min(most, view.tokens))
        best = jnp.pad(best, ((0, 0), (0, 0), (0, most - best.shape[2])))
        reads = jnp.minimum(view.length, jnp.maximum(self.least, self._wanted(view.length)))
        count = jnp.clip(reads - view.tail_len, 0, jnp.minimum(since, most))
        # A commit can make a row due whose window was not yet, and so has no mass.
        told = jnp.any(seen.mass > 0, axis=(1, 2)) & jnp.any(seen.q_tokens >= 0, axis=1)
        full = self.due(state, view) & told
        slots = jnp.where(full, view.slots, len(old["next"]))
        new = {
            "chosen": jnp.where(jnp.arange(most) < count[:, None, None], best + 1, 0),
            "count": count,
            "since": since,
            "next": view.length + self.period,
        }
        return PolicyState(per_slot={name: old[name].at[slots].set(new[name], mode="drop") for name in old})

    def _most(self, layout: Layout) -> int:
        """The longest list."""
        room = layout.pages_per_slot * layout.page
        return min(room, max(self.least, int(self._wanted(layout.tokens))))

    def _wanted(self, stored: int | Int[Array, " B"]) -> int | Int[Array, " B"]:
        """The budget of so many stored tokens, whatever ``least`` says."""
        if isinstance(self.budget, int):
            return self.budget
        share = Fraction(self.budget).limit_denominator(_DENOMINATOR)
        return -(-stored * share.numerator // share.denominator)

    def _of(self, name: str, state: PolicyState, view: View) -> Int[Array, "B ..."]:
        return state.per_slot[name].at[view.slots].get(mode="clip")
