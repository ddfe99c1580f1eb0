"""StreamingLLM: the first few tokens and the last ones stay, all between is evicted (arXiv 2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxllm.cache.policies.base import Keep, Policy, PolicyState
from jaxllm.cache.view import View
from jaxllm.config import positive, require


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Constant memory: attention sinks and a window of recent tokens, for sequences without end.

    A row is cut back to its first ``sinks`` and last ``recent`` tokens when its prompt ends, and then whenever it has
    come to store ``buffer`` more than those (the paper rolls token by token; ``buffer`` 1 does that, at the price of
    rewriting the row's pages each step). Between cuts it reads the whole of what it stores, up to ``buffer`` tokens
    more than the paper's window.

    Differs from the paper: keys are cached after RoPE and keep the positions they had in the text, where the paper
    numbers positions anew inside the cache. So distances to the sinks grow with the text, and a text may not run past
    the positions that the model was trained for. Prompts are read with full attention.

    Attributes:
        sinks: first tokens that stay (4 as published).
        recent: last tokens that stay (1,020, with the sinks the published cache of 1,024).
        buffer: tokens above those two that trigger the next cut; about a page makes each cut free whole pages.
    """

    sinks: int = 4
    recent: int = 1020
    buffer: int = 16

    evicts: ClassVar[bool] = True
    default_page_size: ClassVar[int | None] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.sinks, int) and self.sinks >= 0
        require(whole, "policy.sinks", self.sinks, "must be an integer of at least 0")
        positive(**{"policy.recent": self.recent, "policy.buffer": self.buffer})

    @property
    def kept(self) -> int:
        """Most tokens that stay of a row."""
        return self.sinks + self.recent

    def stored(self, prompt: int, new: int) -> int:
        """Sinks, recent tokens and the buffer, where a request comes to that many."""
        return min(prompt + new, self.kept + self.buffer)

    def triggers(self, state: PolicyState, view: View, ended: Bool[Array, " B"]) -> Bool[Array, " B"]:
        """Rows with a full buffer, and at a prompt's end rows with anything to evict."""
        return (view.length >= self.kept + self.buffer) | (ended & (view.length > self.kept))

    def maintain(self, state: PolicyState, view: View, rows: Bool[Array, " B"]) -> tuple[PolicyState, Keep]:
        """The first ``sinks`` and the last ``recent`` tokens, the same for every KV head; nothing is remembered."""
        at = jnp.arange(min(self.kept, view.tokens))
        count = jnp.minimum(view.length, self.kept)
        tokens = jnp.where(at < self.sinks, at, at + (view.length - count)[:, None])
        shape = (len(count), view.tail_k.shape[1], len(at))
        return state, Keep(jnp.broadcast_to(tokens[:, None], shape), count)
