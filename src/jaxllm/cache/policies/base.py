"""What a cache policy is (contract 4): which of the stored tokens attention reads, and which stay stored.

A policy is a frozen dataclass of settings, static in a step. Its verbs are pure; all that it remembers is in a
:class:`PolicyState`, one for each attention layer, of arrays that belong to physical pages and arrays that belong to
slots. The cache calls the verbs in this order:

    (the step's tokens join the open tails)
    due, select                    # decode steps and windows; a prefill always reads everything
    (attention)
    on_append                      # metadata of the pages that are full now and sealed
    observe                        # what attention has seen
    triggers, maintain             # periodic; the only verb that may evict

Windows of speculation append nothing before their commit, so they run ``select`` alone and leave no trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.batch import Leaf
from jaxllm.cache.view import Layout, View
from jaxllm.config import require


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyState:
    """What a policy remembers of one layer.

    Attributes:
        per_page: name to [P, ...]: moves with a physical page where it is copied, swapped or shared. Written when the
            page is sealed; anything before that.
        per_slot: name to [S, ...]: belongs to a slot; zeroed when a request is admitted, so 0 is what a fresh slot
            has.
    """

    per_page: dict[str, Leaf] = field(default_factory=dict)
    per_slot: dict[str, Leaf] = field(default_factory=dict)


class Selection(NamedTuple):
    """What a decode step reads of the sealed tokens; the open tail is always read.

    Attributes:
        logical: i32[B, K, m] pages or tokens by number, as ``Policy.granularity`` says; -1 past ``count``; none twice.
        count: i32[B, K], how many.
    """

    logical: Any
    count: Any


class Seen(NamedTuple):
    """What attention did in one step.

    Attributes:
        q: [B, T, H, d], queries after RoPE.
        q_positions: i32[B, T], position of each query in its sequence; negative: padding.
        q_tokens: i32[B, T], number among the stored tokens of each query's own token; it and what is before it was
            visible. Negative: padding.
        lse: f32[B, T, H], logarithm of each query's sum of exponentials.
        mass: f32[B, K, L], probability of every stored token, averaged over the query heads of its KV head and the
            step's live queries. With ``due`` it is there in decode steps and committed windows (of all their nodes, over
            what was stored before them), 0 for rows that were not due; with ``wants_mass`` in decode steps; else None.
    """

    q: Any
    q_positions: Any
    q_tokens: Any
    lse: Any
    mass: Any


class Keep(NamedTuple):
    """Which stored tokens survive an eviction, the same number for every KV head.

    Attributes:
        tokens: i32[B, K, m], numbers of the kept tokens, ascending; what lies at and past ``count`` is ignored.
        count: i32[B], how many each row keeps.
    """

    tokens: Any
    count: Any


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies; by itself dense attention over everything stored.

    Attributes:
        dense_layers: attention layers, counted from 0 among themselves, that use dense attention instead.
        overrides: pairs (attention layer, policy): what that layer uses instead.
    """

    dense_layers: tuple[int, ...] = ()
    overrides: tuple[tuple[int, "Policy"], ...] = ()

    #: What ``Selection.logical`` counts.
    granularity: ClassVar[str] = "page"
    #: ``maintain`` removes tokens: what is stored is no longer every token, and pages cannot be shared.
    evicts: ClassVar[bool] = False
    #: What it keeps per slot comes out the same where a prompt is read from a shared prefix on, without the steps that
    #: read the prefix: it is made at the prompt's end or later, from the pages. Else its prompts share nothing.
    rebuilds: ClassVar[bool] = False
    #: Decode steps report the probability of every stored token to ``observe``.
    wants_mass: ClassVar[bool] = False
    #: Page size where the user gives none; None: the policy works without pages.
    default_page_size: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require(
            all(layer >= 0 for layer in self.dense_layers),
            "policy.dense_layers",
            self.dense_layers,
            "attention layers counted from 0",
        )
        layers = [layer for layer, _ in self.overrides]
        good = len(set(layers)) == len(layers) and all(layer >= 0 for layer in layers)
        require(good, "policy.overrides", layers, "different attention layers counted from 0")

    def at(self, layer: int) -> "Policy":
        """The policy of one attention layer (counted from 0 among attention layers)."""
        chosen = dict(self.overrides).get(layer)
        if chosen is not None:
            return chosen.at(layer)
        return Policy() if layer in self.dense_layers else self

    def check(self, layout: Layout) -> None:
        """Raise ConfigError where the policy cannot work with a cache of these sizes, with the reason."""

    def stored(self, prompt: int, new: int) -> int:
        """Most tokens that a request of ``prompt`` and ``new`` generated tokens stores after its prefill (host)."""
        return prompt + new

    def init(self, layout: Layout) -> PolicyState:
        """Fresh arrays of one layer."""
        return PolicyState()

    def on_append(
        self,
        state: PolicyState,
        pages: Int[Array, " m"],
        k: Float[Array, "m K page d"],
        v: Float[Array, "m K page d"],
    ) -> PolicyState:
        """Metadata of pages that were just sealed.

        Args:
            state: of this layer.
            pages: physical pages; P or more = none (a scatter with mode="drop" skips it).
            k: their keys as attention will multiply them: after RoPE, quantised and dequantised again.
            v: their values, likewise.
        """
        return state

    def step_bytes(self, layout: Layout, sealed: Any, key: int) -> Any:
        """Bytes that a decode step of one row reads for the policy itself, over all KV heads: for reports (host).

        Tokens that it selects come beside, the work of ``maintain`` is left out.

        Args:
            layout: sizes.
            sealed: tokens in pages, an integer or an array of them.
            key: bytes of one stored key.
        """
        return 0 * sealed

    def due(self, state: PolicyState, view: View) -> Bool[Array, " B"] | None:
        """Rows that read everything in this decode step or window and report its mass to ``observe``; None: never any."""
        return None

    def select(self, state: PolicyState, q: Float[Array, "B W H d"], view: View) -> Selection | None:
        """Which sealed pages or tokens this step reads, pure and without trace; None: all.

        Args:
            state: of this layer.
            q: queries after RoPE. A window's padding repeats a live query of its row (``heads.repeat_live``), so that
                what a row reads does not depend on how far it was padded.
            view: with the step's tokens in the open tail; of a window, as it was before it.
        """
        return None

    def observe(self, state: PolicyState, view: View, seen: Seen) -> PolicyState:
        """Learn from what attention has seen; ``view`` is after the step's tokens were appended and full pages sealed."""
        return state

    def triggers(self, state: PolicyState, view: View, ended: Bool[Array, " B"]) -> Bool[Array, " B"] | None:
        """Rows that need ``maintain`` now; None: never any.

        The cache passes over rows whose prompt goes on after this step, whatever comes out for them: a prompt in chunks
        is maintained as if it had come at once.

        Args:
            state: after ``observe``.
            view: after the step's tokens were appended and full pages sealed.
            ended: the row's prompt ended with this step (a prefill's last chunk).
        """
        return None

    def maintain(
        self, state: PolicyState, view: View, rows: Bool[Array, " B"]
    ) -> tuple[PolicyState, Keep | None]:
        """Periodic work, under a condition: it runs only where some row triggers.

        Args:
            state: of this layer; rows that did not trigger must come out as they are.
            view: as in ``triggers``.
            rows: which rows triggered.

        Returns:
            the new state, and with ``evicts`` what stays (only rows that triggered are evicted), else None. State that
            is indexed by stored tokens must come out indexed by what is kept. The cache rewrites the pages of those
            rows and calls ``on_append`` for them.
        """
        return state, None


def check_layers(policy: Policy, layers: int) -> None:
    """Raise ConfigError where a policy names an attention layer that a model of ``layers`` of them has not, or where
    it leaves itself none."""
    named: Sequence[int] = [*policy.dense_layers, *(layer for layer, _ in policy.overrides)]
    outside = [layer for layer in named if layer >= layers]
    require(not outside, "policy", f"layers {outside}", f"the model has attention layers 0 to {layers - 1}")
    chosen = [policy.at(layer) for layer in range(layers)]
    require(
        type(policy) is Policy or policy in chosen,
        "policy.dense_layers",
        policy.dense_layers,
        f"leave {type(policy).__name__} no layer of the model's {layers}; name fewer (dense_layers=() for none)",
    )
