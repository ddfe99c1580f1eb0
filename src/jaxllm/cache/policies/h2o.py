"""H2O: keep the tokens that attention has dwelt on most so far, and the last ones (arXiv 2306.14048)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxllm.cache.policies.base import Keep, Policy, PolicyState, Seen
from jaxllm.cache.policies.eviction import keep_best
from jaxllm.cache.policies.mass import column_mass
from jaxllm.cache.view import Layout, View
from jaxllm.config import positive_fields


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Every KV head keeps the last ``recent`` tokens and the ``heavy`` others with most attention since they came.

    A token's score is the sum of the probabilities that all queries so far gave it, averaged over the query heads of its
    KV head. The paper evicts one token in every step; here ``buffer`` tokens gather before an eviction takes them back
    at once, since a page is freed, rewritten and quantised whole. So up to ``buffer`` tokens are read that the paper
    would have dropped, their scores go on growing, and a token that grew heavy among them survives; what is dropped at
    an eviction is what the paper's rule drops from the tokens stored then. A budget of equal halves is the paper's.

    Attributes:
        heavy: tokens kept for their score.
        recent: last tokens that always stay.
        buffer: tokens that gather before the next eviction; a page is natural.

    Raises:
        ConfigError: a size below 1.
    """

    heavy: int = 512
    recent: int = 512
    buffer: int = 64

    evicts: ClassVar[bool] = True
    wants_mass: ClassVar[bool] = True
    default_page_size: ClassVar[int | None] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_fields(self, "policy", "heavy", "recent", "buffer")

    @property
    def budget(self) -> int:
        """Tokens that an eviction leaves."""
        return self.heavy + self.recent

    def stored(self, prompt: int, new: int) -> int:
        """Tokens gather up to ``budget + buffer`` on what the prompt's end leaves."""
        return min(min(prompt, self.budget) + new, self.budget + self.buffer)

    def init(self, layout: Layout) -> PolicyState:
        """The score of every stored token by number: f32[S, K, L]."""
        return PolicyState(
            per_slot={"mass": jnp.zeros((layout.slots, layout.kv_heads, layout.tokens), jnp.float32)}
        )

    def step_bytes(self, layout: Layout, sealed: Any, key: int) -> Any:
        """The scores of all sealed tokens, to which the step's are added."""
        return layout.kv_heads * sealed * 4

    def observe(self, state: PolicyState, view: View, seen: Seen) -> PolicyState:
        """Add the step's probabilities; those of a prefill are computed from its log-sum-exps."""
        if seen.mass is None:
            new = column_mass(view, seen)
        else:
            live = jnp.sum(seen.q_tokens >= 0, axis=1)[:, None, None]
            new = jnp.where((live > 0) & view.stored()[:, None], seen.mass * live, 0)
        mass = state.per_slot["mass"].at[view.slots, :, : view.tokens].add(new, mode="drop")
        return PolicyState(per_slot={"mass": mass})

    def triggers(self, state: PolicyState, view: View, ended: Bool[Array, " B"]) -> Bool[Array, " B"]:
        """Rows whose buffer is full, and long prompts at their end."""
        return (view.length >= self.budget + self.buffer) | (ended & (view.length > self.budget))

    def maintain(self, state: PolicyState, view: View, rows: Bool[Array, " B"]) -> tuple[PolicyState, Keep]:
        """What stays; scores move with their tokens."""
        mass = state.per_slot["mass"]
        scores = mass.at[view.slots].get(mode="clip")[..., : view.tokens]
        keep = keep_best(scores, view.length, self.budget, self.recent)
        # Past the count stands a number past the end, which reads the last entry: no token's then, and 0.
        kept = jnp.take_along_axis(scores, keep.tokens, axis=2, mode="clip")
        kept = jnp.pad(kept, ((0, 0), (0, 0), (0, mass.shape[2] - kept.shape[2])))
        slots = jnp.where(rows, view.slots, len(mass))
        return PolicyState(per_slot={"mass": mass.at[slots].set(kept, mode="drop")}), keep
