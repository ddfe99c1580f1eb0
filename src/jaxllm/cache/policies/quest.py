"""Quest: read the pages whose keys could score highest against the step's query (arXiv 2406.10774)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.cache.policies.base import Policy, PolicyState, Selection
from jaxllm.cache.policies.budget import check_budget, part
from jaxllm.cache.policies.heads import REDUCTIONS, reduce_heads
from jaxllm.cache.view import Layout, View
from jaxllm.config import one_of, require
from pallas_kernels.paged_attention import page_scores

# The page being filled, and one that is chosen.
_LEAST = 2
# What the published evaluation keeps at least.
_LEAST_OF_FRACTION = 3


@dataclass(frozen=True, kw_only=True)
class Quest(Policy):
    """Read-only page selection: nothing is evicted, each step reads the best pages by a box around their keys.

    Each sealed page keeps two vectors per KV head, ``low`` and ``high``, of its keys as attention multiplies them
    (after RoPE, quantised and dequantised). A query's score of the page is ``sum_c max(q_c low_c, q_c high_c)``, with
    the least and the greatest values of each channel an upper bound of every ``q . k`` in it. They are float32, so that
    it stays one whatever the keys' dtype, and cost 2 / page of the keys and values where those are bfloat16.

    The published page budget ``budget // page`` counts the page that is being filled, which is always attended to and
    never scored. The open tail stands for it, so that many less one sealed pages are chosen; with at least as many
    pages in the budget as there are (the tail's included), every sealed page. A fraction is of the pages there are
    (the tail's included), rounded up, and at least three as in the authors' evaluation. Neither first nor recent pages
    are chosen unless they score.

    The authors let each query head choose for itself (their models have one query head per KV head). Here a KV head's
    group shares one choice; "max" is still a bound of its best score (our choice: no ablation is published). The pages
    of a window are chosen by the greatest score among its queries.

    Attributes:
        budget: tokens (int; the authors' library takes 512), or a fraction of the stored length (float).
        reduce: scores of a group of query heads become one by "max", "mean" or "sum".
        scorer: what a page's box holds. "minmax": Quest; "mean": its mean key; "mean+std": a standard deviation of each
            channel to both sides of it (an assumption about a report, by others, that mean and deviation find more
            than loose bounds do).
        dense_layers: as in :class:`Policy`; the first two as published, where attention is hardly sparse. Models with
            few attention layers may not afford that.
    """

    budget: int | float = 512
    reduce: str = "max"
    scorer: str = "minmax"
    dense_layers: tuple[int, ...] = (0, 1)

    default_page_size: ClassVar[int | None] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget("policy.budget", self.budget)
        one_of("policy.reduce", self.reduce, *REDUCTIONS)
        one_of("policy.scorer", self.scorer, "minmax", "mean", "mean+std")

    def check(self, layout: Layout) -> None:
        """Raise ConfigError unless the budget has room for the page being filled and one that is chosen."""
        require(
            isinstance(self.budget, float) or self.budget // layout.page >= _LEAST,
            "policy.budget",
            self.budget,
            f"at least {_LEAST * layout.page} tokens: {_LEAST} pages of {layout.page}, the one being filled included",
        )

    def pages(self, there: int, page: int) -> int:
        """Pages of ``page`` tokens read where there are ``there``, the one that is being filled included in both."""
        if isinstance(self.budget, int):
            return min(self.budget // page, there)
        return min(max(part(self.budget, there), _LEAST_OF_FRACTION), there)

    def init(self, layout: Layout) -> PolicyState:
        """``low`` and ``high`` f32[P, K, d]."""
        box = jnp.zeros((layout.pages, layout.kv_heads, layout.head_dim), jnp.float32)
        return PolicyState(per_page={"low": box, "high": box})

    def step_bytes(self, layout: Layout, sealed: Any, key: int) -> Any:
        """Both vectors of every sealed page."""
        return layout.kv_heads * (sealed // layout.page) * 2 * 4 * layout.head_dim

    def on_append(
        self,
        state: PolicyState,
        pages: Int[Array, " m"],
        k: Float[Array, "m K page d"],
        v: Float[Array, "m K page d"],
    ) -> PolicyState:
        """The boxes of sealed pages, from their keys alone."""
        k = k.astype(jnp.float32)
        if self.scorer == "minmax":
            low, high = jnp.min(k, axis=2), jnp.max(k, axis=2)
        else:
            mean = jnp.mean(k, axis=2)
            spread = jnp.std(k, axis=2) if self.scorer == "mean+std" else 0
            low, high = mean - spread, mean + spread
        old = state.per_page
        new = {"low": old["low"].at[pages].set(low, mode="drop")}
        new |= {"high": old["high"].at[pages].set(high, mode="drop")}
        return PolicyState(per_page=new, per_slot=state.per_slot)

    def select(self, state: PolicyState, q: Float[Array, "B W H d"], view: View) -> Selection:
        """The best sealed pages by number, best first; of equal scores the earlier page."""
        B, W, H, d = q.shape
        n, K = view.table.shape[1], view.tail_k.shape[1]
        # By number of sealed pages, 0 to n: the same integers on the host and on the device.
        budgets = np.asarray([self.pages(sealed + 1, view.page) - 1 for sealed in range(n + 1)], np.int32)
        sealed = jnp.minimum(view.sealed // view.page, n)
        count = jnp.broadcast_to(jnp.asarray(budgets)[sealed][:, None], (B, K))
        grouped = jnp.moveaxis(q.reshape(B, W, K, H // K, d), 1, 3)
        scores = page_scores(
            grouped.reshape(B, H * W, d),
            state.per_page["low"],
            state.per_page["high"],
            table=jnp.broadcast_to(view.table[:, None], (B, K, n)),
            num_pages=jnp.broadcast_to(sealed[:, None], (B, K)),
            reduce="none",
        ).reshape(B, K, H // K, W, n)
        kept = max(int(budgets.max()), 1)
        _, best = lax.top_k(jnp.max(reduce_heads(scores, self.reduce), axis=2), kept)
        return Selection(jnp.where(jnp.arange(kept) < count[..., None], best, -1), count)
