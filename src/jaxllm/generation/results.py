"""What ``generate`` tells: results, the events of a stream, and how they come out of the engine's events."""

from dataclasses import dataclass
from typing import Any

from jaxllm.generation.request import Event
from jaxllm.generation.text import TextStream


@dataclass(frozen=True)
class GenerationResult:
    """What one prompt gave.

    Attributes:
        token_ids: the sampled tokens, those that ended the answer included.
        text: their text, without the stop string that ended it; None without a tokenizer.
        answer: the text after the end of thinking, "" where thinking did not end; all of it where there was none, or
            ``thinking_budget`` was not given.
        finish_reason: "stop" (stop id or stop string) or "length" (max_new_tokens).
        prompt_tokens: tokens of the prompt.
        thinking_tokens: tokens up to the end of thinking, which is counted too; None where the prompt does not end
            with what opens thinking, or ``thinking_budget`` was not given.
        logprobs: log-probability of each token under the model itself, before temperature and penalties; None unless
            asked for.
        top_logprobs: for each token the most likely ones, (id, log-probability); None unless asked for.
        time_to_first_token: seconds from the call to this prompt's first token, waiting and compiling included.
        decode_tokens_per_second: tokens after the first over the time since the first; None with fewer than two.
    """

    token_ids: list[int]
    text: str | None
    answer: str | None
    finish_reason: str
    prompt_tokens: int
    thinking_tokens: int | None
    logprobs: list[float] | None
    top_logprobs: list[tuple[tuple[int, float], ...]] | None
    time_to_first_token: float
    decode_tokens_per_second: float | None


@dataclass(frozen=True)
class StreamEvent:
    """One token of a stream.

    Attributes:
        index: which prompt.
        token_id: the token.
        text: text that became certain with it, often empty; "" without a tokenizer.
        logprob: its log-probability, where asked for.
        result: the whole result, on the prompt's last event.
    """

    index: int
    token_id: int
    text: str
    logprob: float | None = None
    result: GenerationResult | None = None


class Answer:
    """What is known of one prompt's answer."""

    def __init__(
        self,
        index: int,
        prompt_tokens: int,
        tokenizer: Any,
        stop: tuple[str, ...],
        end: tuple[int, ...] | None,
        started: float,
    ):
        """``end`` are the ids that end thinking, None where the prompt opens none."""
        self.index, self.prompt_tokens, self.started = index, prompt_tokens, started
        self.end, self.thinking = end, end is not None
        self.thinking_tokens = None if end is None else 0
        self.answer_from = 0
        self.stream = None if tokenizer is None else TextStream(tokenizer, stop)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[tuple[tuple[int, float], ...]] = []
        self.first = self.last = started
        self.done = False

    def take(self, event: Event, now: float) -> StreamEvent:
        """Add a token; ``now`` is when it became known."""
        if not self.tokens:
            self.first = now
        self.last = now
        self.tokens.append(event.token)
        if event.logprob is not None and event.top_logprobs is not None:
            self.logprobs.append(event.logprob)
            self.top.append(event.top_logprobs)
        piece, reason = "", event.finish_reason
        if self.stream is not None:
            piece = self.stream.push(event.token)
            if reason is not None:
                piece += self.stream.flush()
            reason = "stop" if self.stream.stopped else reason
        if self.thinking:
            self._think()
        self.done = reason is not None
        result = None if reason is None else self._result(reason)
        return StreamEvent(self.index, event.token, piece, event.logprob, result)

    def _think(self) -> None:
        self.thinking_tokens = len(self.tokens)
        self.thinking = tuple(self.tokens[-len(self.end or ()) :]) != self.end
        if not self.thinking and self.stream is not None:
            self.answer_from = self.stream.received

    def _result(self, reason: str) -> GenerationResult:
        seconds = self.last - self.first
        text = None if self.stream is None else self.stream.text
        answer = None if text is None else text[len(text) if self.thinking else self.answer_from :]
        return GenerationResult(
            token_ids=self.tokens,
            text=text,
            answer=answer,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            thinking_tokens=self.thinking_tokens,
            logprobs=self.logprobs or None,
            top_logprobs=self.top if any(self.top) else None,
            time_to_first_token=self.first - self.started,
            decode_tokens_per_second=(len(self.tokens) - 1) / seconds if seconds > 0 else None,
        )
