"""What is asked of the engine, and what it tells back: plain host data."""

import math
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config import require
from jaxllm.generation.budget import ThinkingBudget
from jaxllm.generation.sampling import Features

# Larger top-n lists cost more than they tell.
MAX_LOGPROBS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; checked on construction.

    Attributes:
        max_new_tokens: most tokens to sample.
        min_new_tokens: stop ids are impossible before this many tokens.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; None: all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this, in (0, 1]; None: all.
        min_p: keep tokens at least this times as likely as the most likely one, in [0, 1]; None: all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output; above 0.
        presence_penalty: subtracted from logits of tokens in the output, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        seed: with a token's position it decides the draw; nothing else does.
        stop_token_ids: tokens that end the request; the ending token is the last of ``token_ids``.
        logprobs: report log-probabilities of the chosen tokens and of this many most likely ones; None: none.
        thinking: the prompt stands inside thinking, which is to be closed after so many tokens; None: nothing is.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    thinking: ThinkingBudget | None = None

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            require(ok, name, getattr(self, name), allowed)

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        check(
            "max_new_tokens",
            whole(self.max_new_tokens) and self.max_new_tokens >= 1,
            "must be an integer of at least 1",
        )
        check(
            "min_new_tokens",
            whole(self.min_new_tokens) and 0 <= self.min_new_tokens <= self.max_new_tokens,
            f"must be an integer from 0 to max_new_tokens={self.max_new_tokens}",
        )
        check(
            "temperature",
            self.temperature >= 0 and math.isfinite(self.temperature),
            "must be 0 (the most likely token) or a positive number",
        )
        check(
            "top_k",
            self.top_k is None or (whole(self.top_k) and self.top_k >= 1),
            "must be None or at least 1",
        )
        check("top_p", self.top_p is None or 0 < self.top_p <= 1, "must be None or in (0, 1]")
        check("min_p", self.min_p is None or 0 <= self.min_p <= 1, "must be None or in [0, 1]")
        check(
            "repetition_penalty",
            self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
            "must be above 0; 1 is none",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, -2 <= getattr(self, name) <= 2, "must be in [-2, 2]; 0 is none")
        check("seed", whole(self.seed) and 0 <= self.seed < 2**32, "must be an integer from 0 to 2**32 - 1")
        check(
            "stop_token_ids",
            all(whole(token) and token >= 0 for token in self.stop_token_ids),
            "must be token ids of at least 0",
        )
        check(
            "logprobs",
            self.logprobs is None or (whole(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
            f"must be None or an integer from 0 to {MAX_LOGPROBS}",
        )
        barred = set(self.stop_token_ids) if self.min_new_tokens else set()
        check(
            "thinking",
            self.thinking is None or not barred.intersection(self.thinking.close),
            "with min_new_tokens, stop_token_ids may hold none of the closing ids: they are forced",
        )

    @property
    def features(self) -> Features:
        """What a step must be able to do for this request."""
        sampled = self.temperature > 0
        penalised = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (
            1.0,
            0.0,
            0.0,
        )
        filtered = self.top_k is not None or (self.top_p or 1) < 1 or bool(self.min_p)
        return Features(
            random=sampled,
            filters=sampled and filtered,
            penalties=penalised,
            min_tokens=self.min_new_tokens > 0 and bool(self.stop_token_ids),
            thinking=self.thinking is not None and self.thinking.limited,
            logprobs=self.logprobs,
        )


def union(features: list[Features]) -> Features:
    """The features that serve all of several requests."""
    logprobs = [f.logprobs for f in features if f.logprobs is not None]
    return Features(
        random=any(f.random for f in features),
        filters=any(f.filters for f in features),
        penalties=any(f.penalties for f in features),
        min_tokens=any(f.min_tokens for f in features),
        thinking=any(f.thinking for f in features),
        logprobs=max(logprobs, default=None),
    )


@dataclass(frozen=True)
class Event:
    """One token of one request.

    Attributes:
        request: the number that ``Engine.add`` gave.
        token: the sampled token.
        logprob: its log-probability, where asked for.
        top_logprobs: the most likely tokens and theirs, most likely first, where asked for.
        finish_reason: "stop" (a stop id) or "length" on the last token, else None.
    """

    request: int
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    finish_reason: str | None = None


@dataclass
class Running:
    """Host state of a request inside the engine.

    Attributes:
        number: the number of the request.
        prompt: its token ids.
        params: how its tokens are chosen.
        slot: the slot it holds; -1 while it waits.
        read: tokens of the prompt that are in the cache.
        output: tokens sampled so far.
        suspended: what it held when it had to make room for others; None: it did not, or has it again.
    """

    number: int
    prompt: list[int]
    params: SamplingParams
    slot: int = -1
    read: int = 0
    output: list[int] = field(default_factory=list)
    suspended: Any = None
    features: Features = field(init=False)

    def __post_init__(self) -> None:
        self.features = self.params.features

    @property
    def sampled(self) -> int:
        """Tokens sampled so far."""
        return len(self.output)

    @property
    def stored(self) -> int:
        """Tokens that its slot has taken up; the last sampled one waits for the next step."""
        return self.read + max(self.sampled - 1, 0)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens of prompt and output by position."""
        split = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(start - split, 0) : max(stop - split, 0)]

    @property
    def length(self) -> int:
        """Positions that its slot holds once the next decode step has run."""
        return len(self.prompt) + self.sampled
