"""Reasoning budgets on the device: one finite-state machine per slot, advanced with every sampled token."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from jaxllm.batch import Leaf
from jaxllm.generation.budget import CLOSING, FREE, THINKING, ThinkingBudget


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Thinking:
    """Where S slots are in their thinking.

    Attributes:
        phase: i32[S]; FREE: nothing is forced; THINKING; CLOSING + j: ``close[j]`` is forced next.
        spent: i32[S]; thinking tokens so far.
        earliest: i32[S]; thinking tokens after which a newline begins closing.
        latest: i32[S]; thinking tokens after which closing begins anyway.
        recent: i32[S, n]; the last thinking tokens, the newest last; -1 where there are fewer.
        end: i32[S, n]; what ends thinking, behind -1.
        close: i32[S, n]; what is forced, before -1.
    """

    phase: Leaf
    spent: Leaf
    earliest: Leaf
    latest: Leaf
    recent: Leaf
    end: Leaf
    close: Leaf


def init_thinking(slots: int, width: int) -> Thinking:
    """Slots of which none is thinking; ``width`` is the longest closing or ending sequence."""
    return jax.tree.map(jnp.asarray, thinking_rows([], [], frozenset(), slots, width))


def thinking_rows(
    budgets: Sequence[ThinkingBudget | None],
    prompts: Sequence[Sequence[int]],
    newline_ids: Collection[int],
    rows: int,
    width: int,
) -> Thinking:
    """State of new requests as host arrays, ``rows`` of them.

    Args:
        budgets: one per request; None: not thinking.
        prompts: their token ids.
        newline_ids: ids whose text has a newline.
        rows: at least as many as requests.
        width: as in :func:`init_thinking`.
    """
    phase, spent, earliest, latest = np.zeros((4, rows), np.int32)
    recent, end, close = np.full((3, rows, width), -1, np.int32)
    for row, (budget, prompt) in enumerate(zip(budgets, prompts)):
        # An unlimited row stays FREE: nothing is ever forced in it.
        if budget is None or not budget.limited:
            continue
        phase[row] = budget.phase(prompt, newline_ids)
        spent[row], earliest[row], latest[row] = budget.spent, budget.earliest, budget.latest
        last = budget.recent(prompt)
        recent[row, width - len(last) :] = last
        end[row, width - len(budget.end) :] = budget.end
        close[row, : len(budget.close)] = budget.close
    return Thinking(phase, spent, earliest, latest, recent, end, close)


def force(tokens: Int32[Array, " R"], state: Thinking) -> Int32[Array, " R"]:
    """``tokens`` with closing ids in the rows that are closing, whatever was drawn there."""
    place = jnp.maximum(state.phase - CLOSING, 0)
    forced = jnp.take_along_axis(state.close, place[:, None], axis=1)[:, 0]
    return jnp.where(state.phase >= CLOSING, forced, tokens)


def advance_thinking(
    state: Thinking, tokens: Int32[Array, " R"], sampled: Bool[Array, " R"], newline: Bool[Array, " V"]
) -> Thinking:
    """``state`` after each row's next token; rows that are not ``sampled`` stay.

    Args:
        state: R rows.
        tokens: what was sampled, forced tokens included.
        sampled: rows that sampled.
        newline: ids whose text has a newline.
    """
    thinking = sampled & (state.phase == THINKING)
    spent = state.spent + thinking
    recent = jnp.concatenate([state.recent[:, 1:], tokens[:, None]], axis=1)
    ended = jnp.all((recent == state.end) | (state.end < 0), axis=1)
    due = (spent >= state.latest) | ((spent >= state.earliest) & newline[tokens])
    after_thinking = jnp.where(ended, FREE, jnp.where(due, CLOSING, THINKING))
    done = state.phase - CLOSING + 1 >= jnp.sum(state.close >= 0, axis=1)
    after_closing = jnp.where(done, FREE, state.phase + 1)
    closing = sampled & (state.phase >= CLOSING)
    return replace(
        state,
        phase=jnp.where(thinking, after_thinking, jnp.where(closing, after_closing, state.phase)),
        spent=spent,
        recent=jnp.where(thinking[:, None], recent, state.recent),
    )


def newline_table(newline_ids: Collection[int], vocab: int) -> Any:
    """bool[V]; True at ``newline_ids``."""
    table = np.zeros(vocab, bool)
    table[[index for index in newline_ids if index < vocab]] = True
    return jnp.asarray(table)
