"""Interpolated Kneser-Ney n-gram models: the bar that a language model of the same data must clear.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1998: the interpolated form,
`modified` with three discounts per order.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Integer

# Where counts of counts leave a discount undefined, as in small corpora: KenLM's choice.
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True, eq=False)
class _Order:
    """One order of the model; keys are n-grams as numbers in base V + 1.

    Attributes:
        ngrams: int64[G], sorted; all n-grams that were seen.
        discounted: f64[G]; (count - discount) / total of the context.
        contexts: int64[C], sorted; all contexts that were seen.
        backoff: f64[C]; probability mass that each context leaves to the next lower order.
    """

    ngrams: np.ndarray
    discounted: np.ndarray
    contexts: np.ndarray
    backoff: np.ndarray


class KneserNey:
    """An interpolated Kneser-Ney model of token documents.

    The highest order counts occurrences, lower orders count distinct left neighbours, and a uniform distribution over
    the vocabulary stands below them, so that every token has a probability in every context. N-grams do not cross
    documents; contexts at a document's beginning are filled with a start mark outside the vocabulary. The first token of
    a document (its begin token) is context only, as it is for a model that predicts next tokens.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, "n"],
        offsets: Int64[np.ndarray, "d"],
        vocab_size: int,
        *,
        order: int = 3,
        modified: bool | None = None,
    ):
        """Fits the model.

        Args:
            tokens: ids of all documents, end to end.
            offsets: int64[D + 1]; document d is `tokens[offsets[d]:offsets[d + 1]]`.
            vocab_size: V.
            order: 2 for bigrams, 3 for trigrams; 1 and more work while (V + 1) ** order fits in 63 bits.
            modified: three discounts per order instead of one; None: from trigrams on.

        Raises:
            ValueError: the order cannot be counted in 63 bits, or no token has a predecessor.
        """
        self.vocab_size, self.order = vocab_size, order
        self._base = vocab_size + 1
        if order < 1 or self._base**order >= 1 << 63:
            raise ValueError(
                f"order: got {order} for a vocabulary of {vocab_size}; (vocab_size + 1) ** order must be below 2 ** 63"
            )
        self.modified = order >= 3 if modified is None else modified
        keys = np.sort(self._keys(tokens, offsets))
        if not keys.size:
            raise ValueError(
                "tokens: got no document of two tokens or more; give documents with something to predict"
            )
        orders = []
        for length in range(order, 0, -1):
            ngrams, counts = _run_lengths(keys)
            orders.append(self._fit_order(ngrams, counts))
            # Each distinct n-gram is one distinct left neighbour of its suffix.
            keys = np.sort(ngrams % self._base ** (length - 1))
        self._orders = orders[::-1]

    def _keys(self, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """int64[number of targets]; the n-gram that ends in each target, in the targets' order."""
        wide = np.asarray(tokens).astype(np.int64)
        place = np.arange(len(wide)) - np.repeat(offsets[:-1], np.diff(offsets))
        targets = np.flatnonzero(place > 0)
        keys = np.zeros(len(targets), np.int64)
        for back in range(self.order - 1, -1, -1):
            inside = place[targets] >= back
            keys = keys * self._base + np.where(
                inside, wide[targets - np.where(inside, back, 0)], self.vocab_size
            )
        return keys

    def _fit_order(self, ngrams: np.ndarray, counts: np.ndarray) -> _Order:
        discount = _discounts(counts, self.modified)[np.minimum(counts, 3)]
        contexts = ngrams // self._base
        starts = np.flatnonzero(np.diff(contexts, prepend=-1))
        totals = np.add.reduceat(counts, starts)
        backoff = np.add.reduceat(discount, starts) / totals
        per_ngram = np.repeat(totals, np.diff(starts, append=len(ngrams)))
        return _Order(ngrams, (counts - discount) / per_ngram, contexts[starts], backoff)

    def _probabilities(self, keys: np.ndarray) -> np.ndarray:
        """f64[n]; probability of the last token of each n-gram key, given the tokens before it."""
        result = np.full(len(keys), 1.0 / self.vocab_size)
        for length, level in enumerate(self._orders, 1):
            key = keys % self._base**length
            discounted = _lookup(level.ngrams, level.discounted, key, 0.0)
            result = discounted + _lookup(level.contexts, level.backoff, key // self._base, 1.0) * result
        return result

    def log_probabilities(
        self, tokens: Integer[np.ndarray, "n"], offsets: Int64[np.ndarray, "d"]
    ) -> Float64[np.ndarray, "targets"]:
        """Natural logarithms of the probabilities of all tokens but the first of each document, in their order.

        Args:
            tokens: ids of all documents, end to end.
            offsets: int64[D + 1], as in fitting.
        """
        return np.log(self._probabilities(self._keys(tokens, offsets)))

    def nats_per_token(self, tokens: Integer[np.ndarray, "n"], offsets: Int64[np.ndarray, "d"]) -> float:
        """Mean negative log-probability, over the targets that `log_probabilities` scores.

        Raises:
            ValueError: there are none.
        """
        scores = self.log_probabilities(tokens, offsets)
        if not scores.size:
            raise ValueError("tokens: got no document of two tokens or more; there is nothing to score")
        return float(-scores.mean())

    def distribution(self, history: list[int]) -> Float64[np.ndarray, "V"]:
        """Probability of each token as the next of a document that begins with `history`."""
        used = ([self.vocab_size] * self.order + list(history))[len(history) + 1 :]
        context = 0
        for token in used:
            context = context * self._base + token
        return self._probabilities(context * self._base + np.arange(self.vocab_size, dtype=np.int64))


def _run_lengths(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct keys, their counts) of sorted keys."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[starts], np.diff(starts, append=len(keys))


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], missing)


def _discounts(counts: np.ndarray, modified: bool) -> np.ndarray:
    """f64[4]; what is taken from counts of 0 (nothing), 1, 2, and 3 or more."""
    one, two, three, four = (np.bincount(np.minimum(counts, 5), minlength=6)[1:5]).astype(float)
    if not modified:
        single = one / (one + 2 * two) if one else 0.5
        return np.array([0.0, single, single, single])
    common = one / (one + 2 * two) if one else 0.0
    ratios = ((1, two, one), (2, three, two), (3, four, three))
    found = [k - (k + 1) * common * upper / lower if lower else 0.0 for k, upper, lower in ratios]
    # A discount of nothing leaves no mass for unseen tokens; the estimate never exceeds its count.
    return np.array([0.0, *(d if d > 0 else fallback for d, fallback in zip(found, _FALLBACK_DISCOUNTS))])
