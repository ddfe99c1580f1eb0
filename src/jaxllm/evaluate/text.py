"""Bits per byte and perplexity of text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.config import ConfigError
from jaxllm.evaluate.scoring import STEP_TOKENS, score_windows
from jaxllm.evaluate.windows import Window, strided_windows
from jaxllm.model.functional import LanguageModel

WINDOW = 1024
# Windows scored before their token scores are summed up: bounds host memory on large corpora.
_GROUP_TOKENS = 1 << 20


@dataclass(frozen=True)
class TextScore:
    """What a model makes of some text.

    Attributes:
        documents: number of documents.
        tokens: scored tokens, each scored once.
        bytes: UTF-8 bytes of the text; 0 where only token ids were given.
        nll: summed negative log-likelihood of the scored tokens, in nats.
        greedy: scored tokens that were the model's first choice.
        window: most tokens of a window.
        stride: tokens between the starts of two windows.
    """

    documents: int
    tokens: int
    bytes: int
    nll: float
    greedy: int
    window: int
    stride: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of :attr:`loss`; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte, the figure that does not depend on the tokenizer; None without bytes."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the model's first choice."""
        return self.greedy / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, derived figures included."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.accuracy,
            "window": self.window,
            "stride": self.stride,
        }


def _score(
    lm: LanguageModel,
    documents: Iterable[np.ndarray],
    n_bytes: int,
    window: int,
    stride: int | None,
    step_tokens: int,
) -> TextScore:
    stride = max(1, window // 2) if stride is None else stride
    nll, tokens, greedy, count = 0.0, 0, 0, 0
    group: list[Window] = []

    def flush() -> None:
        nonlocal nll, tokens, greedy
        for score in score_windows(lm, group, step_tokens=step_tokens):
            nll += float(score.nll.sum())
            tokens += len(score.nll)
            greedy += int(score.greedy.sum())
        group.clear()

    held = 0
    for document in documents:
        count += 1
        for piece in strided_windows(document, window, stride):
            group.append(piece)
            held += len(piece.tokens)
            if held >= _GROUP_TOKENS:
                flush()
                held = 0
    flush()
    if not tokens:
        raise ConfigError("documents: none has a token to score; give at least one that is not empty")
    return TextScore(count, tokens, n_bytes, nll, greedy, window, stride)


def prefix_token(lm: LanguageModel) -> int:
    """The id in front of every document: begin of text, or end of text where the tokenizer has no begin.

    Raises:
        ConfigError: the model has no tokenizer, or its tokenizer has neither.
    """
    if lm.tokenizer is None:
        raise ConfigError(
            "lm.tokenizer=None: text needs a tokenizer; load a folder that has a tokenizer.json"
        )
    prefix = lm.tokenizer.bos_id if lm.tokenizer.bos_id is not None else lm.tokenizer.eos_id
    if prefix is None:
        raise ConfigError(
            "lm.tokenizer: has neither a begin nor an end token, so a document's first token would have no context; "
            "name one of them in tokenizer_config.json (bos_token or eos_token)"
        )
    return prefix


def score_documents(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    window: int = WINDOW,
    stride: int | None = None,
    step_tokens: int = STEP_TOKENS,
) -> TextScore:
    """Bits per byte of documents: each as begin token, text, end token, and all but the begin token scored once.

    The end token (where the tokenizer has one) is scored too: a model that compresses documents has to say where they
    end. Documents never see each other.

    Args:
        lm: a model with its tokenizer.
        texts: documents; empty ones count for nothing.
        window: most tokens of a window.
        stride: tokens between the starts of two windows of a long document; None: half the window.
        step_tokens: tokens of one step.

    Raises:
        ConfigError: no tokenizer, nothing to score, or a window or stride out of range.
    """
    prefix = prefix_token(lm)
    kept = [text for text in texts if text]
    encoded = (
        np.array([prefix, *ids], np.int32)
        for begin in range(0, len(kept), 256)
        for ids in lm.tokenizer.encode_batch(kept[begin : begin + 256], eos=True)
    )
    n_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in kept)
    return _score(lm, encoded, n_bytes, window, stride, step_tokens)


def perplexity(
    lm: LanguageModel,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    step_tokens: int = STEP_TOKENS,
) -> TextScore:
    """Strided perplexity of one sequence of token ids, as Hugging Face's guide defines it.

    Window i covers tokens ``i * stride .. i * stride + window``; each scores the tokens that no window before it has
    scored. The first token is context only. Unlike the guide's code, which weighs the mean of each later window by one
    token too few, every token has weight one.

    Args:
        lm: the model; its tokenizer is not used.
        tokens: at least 2 ids.
        window: most tokens of a window (the guide's ``max_length``).
        stride: tokens between the starts of two windows, below ``window``; None: half of it.
        step_tokens: tokens of one step.

    Raises:
        ConfigError: nothing to score, an id that the model does not have, or a window or stride out of range.
    """
    return _score(lm, [np.asarray(tokens, np.int32)], 0, window, stride, step_tokens)
