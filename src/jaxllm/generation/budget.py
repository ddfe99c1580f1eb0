"""Reasoning budgets of requests: plain host data, and where in the thinking a prompt ends.

The rule is Nemotron 3's (arXiv 2512.20856): after a budget of thinking tokens the end of thinking is forced, at the
first token with a newline or ``grace`` tokens later.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.config import require

# Phases of a request, as the device keeps them: CLOSING + j forces the j-th closing id next.
FREE, THINKING, CLOSING = 0, 1, 2

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class ThinkingBudget:
    """How long a request whose prompt stands inside thinking may go on thinking; checked on construction.

    Attributes:
        tokens: thinking tokens before closing begins; negative: unlimited.
        close: what is then forced, token ids; holds ``end``.
        end: token ids by which the model itself ends thinking.
        grace: tokens that may follow the budget while no newline comes.
        spent: tokens at the end of the prompt that are thinking already, 0 if it ends with what opens thinking. They
            count, so that an answer that is taken up again closes where it would have closed.
    """

    tokens: int
    close: tuple[int, ...]
    end: tuple[int, ...]
    grace: int = 0
    spent: int = 0

    def __post_init__(self) -> None:
        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        require(whole(self.tokens), "thinking.tokens", self.tokens, "must be an integer; negative: unlimited")
        for name in ("grace", "spent"):
            value = getattr(self, name)
            require(
                whole(value) and value >= 0, f"thinking.{name}", value, "must be an integer of at least 0"
            )
        for name in ("end", "close"):
            ids = getattr(self, name)
            require(
                isinstance(ids, tuple) and bool(ids) and all(whole(token) and token >= 0 for token in ids),
                f"thinking.{name}",
                ids,
                "must be a tuple of at least one token id",
            )
        width = len(self.end)
        holds = any(self.close[i : i + width] == self.end for i in range(len(self.close)))
        require(
            holds,
            "thinking.close",
            self.close,
            f"must hold the end of thinking {self.end}, or it would go on",
        )

    @property
    def limited(self) -> bool:
        """Whether it can ever force a token."""
        return self.tokens >= 0

    @property
    def latest(self) -> int:
        """Thinking tokens after which closing begins in any case."""
        return min(self.tokens + self.grace, _LARGEST)

    @property
    def earliest(self) -> int:
        """Thinking tokens after which closing begins at a newline."""
        return min(self.tokens, _LARGEST)

    def recent(self, prompt: Sequence[int]) -> list[int]:
        """The last thinking tokens of the prompt, as many as ``end`` has, or fewer."""
        return list(prompt[len(prompt) - min(self.spent, len(self.end)) :])

    def phase(self, prompt: Sequence[int], newline_ids: Collection[int]) -> int:
        """Phase in which the first token is sampled; a newline of what opened thinking is none."""
        recent = self.recent(prompt)
        if not self.limited or tuple(recent) == self.end:
            return FREE
        newline = bool(recent) and recent[-1] in newline_ids
        due = self.spent >= self.latest or (self.spent >= self.earliest and newline)
        return CLOSING if due else THINKING

    def check_fits(self, prompt_tokens: int, vocab: int, width: int) -> None:
        """Raise ConfigError unless an engine for ids below ``vocab`` and sequences of ``width`` can serve this."""
        require(
            self.spent <= prompt_tokens,
            "thinking.spent",
            self.spent,
            f"at most the {prompt_tokens} tokens of the prompt",
        )
        outside = [token for token in self.close if token >= vocab]
        require(not outside, "thinking.close", outside[:1], f"token ids must be from 0 to {vocab - 1}")
        for name in ("end", "close"):
            ids = getattr(self, name)
            require(
                not self.limited or len(ids) <= width,
                f"thinking.{name}",
                ids,
                f"at most thinking_width={width} ids in this engine",
            )


Marker = str | Sequence[int]

# Tokens at the end of a prompt that are searched for what opens thinking.
_TAIL = 32


@dataclass(frozen=True)
class ThinkingMarkers:
    """What opens and ends thinking, and what closes it, for one tokenizer.

    Attributes:
        open: text or token ids.
        end: token ids.
        close: token ids.
    """

    open: Marker
    end: tuple[int, ...]
    close: tuple[int, ...]

    @classmethod
    def resolve(
        cls, tokenizer: Any, markers: tuple[Marker, Marker], close: Marker | None
    ) -> "ThinkingMarkers":
        """Markers as token ids; texts may hold special tokens.

        Args:
            tokenizer: needed for texts; None: only ids.
            markers: what opens and what ends thinking.
            close: what is forced; None: what ends thinking.

        Raises:
            ConfigError: a text without a tokenizer, an empty marker, or ``close`` does not hold the end.
        """
        require(
            isinstance(markers, tuple) and len(markers) == 2 and all(len(marker) > 0 for marker in markers),
            "thinking_markers",
            markers,
            "must be what opens and what ends thinking, neither of them empty",
        )

        def ids(name: str, marker: Marker) -> tuple[int, ...]:
            if not isinstance(marker, str):
                return tuple(int(token) for token in marker)
            require(
                tokenizer is not None, name, marker, "text needs a model with a tokenizer; give token ids"
            )
            return tuple(tokenizer.encode(marker, parse_special=True))

        opener, ender = markers
        if isinstance(opener, str):
            ids("thinking_markers", opener)
        end = ids("thinking_markers", ender)
        if close is None:
            return cls(opener, end, end)
        if isinstance(close, str) and isinstance(ender, str):
            before, found, after = close.partition(ender)
            require(bool(found), "thinking_close", close, f"must hold {ender!r}, or thinking would go on")
            # In one piece the marker's tokens could merge with their neighbours.
            return cls(opener, end, ids("thinking_close", before) + end + ids("thinking_close", after))
        return cls(opener, end, ids("thinking_close", close))

    def opens(self, tokenizer: Any, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with what opens thinking; white space may follow it."""
        if not isinstance(self.open, str):
            return list(prompt[-len(self.open) :]) == list(self.open)
        # As text: a marker that is no single token is spelt differently in different surroundings.
        tail = tokenizer.decode(list(prompt[-_TAIL:]), skip_special=False)
        return tail.rstrip().endswith(self.open.strip())


def prompt_budgets(
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    grace: int,
    close: Marker | None,
    markers: tuple[Marker, Marker],
    vocab: int,
) -> list[ThinkingBudget | None]:
    """The budget of every prompt that ends with what opens thinking; None for the others.

    Args:
        tokenizer: as in :meth:`ThinkingMarkers.resolve`.
        prompts: token ids.
        tokens: of a budget; negative: unlimited.
        grace: of a budget.
        close: as in :meth:`ThinkingMarkers.resolve`.
        markers: as there.
        vocab: ids that can be sampled.

    Raises:
        ConfigError: an argument is not as above; named as an argument of :func:`jaxllm.generate`.
    """
    whole = isinstance(tokens, int) and not isinstance(tokens, bool)
    require(whole, "thinking_budget", tokens, "must be None or an integer; negative: unlimited")
    whole = isinstance(grace, int) and not isinstance(grace, bool)
    require(whole and grace >= 0, "thinking_grace", grace, "must be an integer of at least 0")
    known = ThinkingMarkers.resolve(tokenizer, markers, close)
    outside = [token for token in known.close if not 0 <= token < vocab]
    require(not outside, "thinking_close", outside[:1], f"token ids must be from 0 to {vocab - 1}")
    budget = ThinkingBudget(tokens, known.close, known.end, grace)
    return [budget if known.opens(tokenizer, prompt) else None for prompt in prompts]


def sequence_width(budgets: Sequence[ThinkingBudget | None]) -> int:
    """The longest sequence of ids that closes or ends thinking; 0 where nothing can be forced."""
    return max((max(len(b.close), len(b.end)) for b in budgets if b is not None and b.limited), default=0)
