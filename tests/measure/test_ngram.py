"""Kneser-Ney against a slow implementation in dictionaries, and as a distribution."""

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.measure.ngram import KneserNey

V = 5
DOCUMENTS = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=30), min_size=1, max_size=6).filter(
    lambda documents: any(len(document) > 1 for document in documents)
)
ORDERS = st.sampled_from([(1, False), (2, False), (2, True), (3, False), (3, True), (4, True)])


def flat(documents):
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
    return np.concatenate([np.asarray(document, np.uint16) for document in documents]), offsets


class SlowKneserNey:
    """The formulas one count at a time."""

    def __init__(self, documents, order, modified):
        self.order = order
        highest = defaultdict(int)
        for document in documents:
            padded = [V] * order + list(document)
            for end in range(order + 1, len(padded)):
                highest[tuple(padded[end - order + 1 : end + 1])] += 1
        self.counts = {order: highest}
        for length in range(order - 1, 0, -1):
            left = defaultdict(set)
            for ngram in self.counts[length + 1]:
                left[ngram[1:]].add(ngram[0])
            self.counts[length] = {ngram: len(neighbours) for ngram, neighbours in left.items()}
        self.discounts = {length: self.estimate(counts, modified) for length, counts in self.counts.items()}

    @staticmethod
    def estimate(counts, modified):
        n = [sum(count == wanted for count in counts.values()) for wanted in range(5)]
        if not modified:
            single = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
            return [0, single, single, single]
        common = n[1] / (n[1] + 2 * n[2]) if n[1] else 0
        values = [0]
        for k, fallback in ((1, 0.5), (2, 1.0), (3, 1.5)):
            value = k - (k + 1) * common * n[k + 1] / n[k] if n[k] else 0
            values.append(value if value > 0 else fallback)
        return values

    def probability(self, token, context):
        if context is None:
            return 1 / V
        length = len(context) + 1
        lower = self.probability(token, context[1:] if context else None)
        followers = {ngram: count for ngram, count in self.counts[length].items() if ngram[:-1] == context}
        if not followers:
            return lower
        total, discount = sum(followers.values()), self.discounts[length]
        own = followers.get((*context, token), 0)
        backoff = sum(discount[min(count, 3)] for count in followers.values()) / total
        return (own - discount[min(own, 3)]) / total + backoff * lower


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, DOCUMENTS, ORDERS)
def test_agrees_with_dictionaries(train, held_out, kind):
    order, modified = kind
    fast = KneserNey(*flat(train), V, order=order, modified=modified)
    slow = SlowKneserNey(train, order, modified)
    expected = []
    for document in held_out:
        padded = [V] * order + document
        expected += [
            math.log(slow.probability(padded[end], tuple(padded[end - order + 1 : end])))
            for end in range(order + 1, len(padded))
        ]
    got = fast.log_probabilities(*flat(held_out))
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    assert fast.nats_per_token(*flat(held_out)) == pytest.approx(-np.mean(expected))


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.lists(st.integers(0, V - 1), max_size=4), ORDERS)
def test_every_context_has_a_distribution_without_zeros(train, history, kind):
    model = KneserNey(*flat(train), V, order=kind[0], modified=kind[1])
    probabilities = model.distribution(history)
    assert (probabilities > 0).all()
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_the_distribution_is_what_is_scored():
    train, history = [[0, 1, 2, 1, 2, 3, 1, 2, 4, 0, 1]], [0, 1]
    model = KneserNey(*flat(train), V)
    scored = [model.log_probabilities(*flat([[*history, token]]))[-1] for token in range(V)]
    np.testing.assert_allclose(np.exp(scored), model.distribution(history), rtol=1e-12)


def test_ngrams_do_not_cross_documents():
    # 1 always follows 0 inside documents; only across their border does 2 follow 1.
    model = KneserNey(*flat([[2, 0, 1]] * 8), V, order=2)
    assert model.distribution([2, 0]).argmax() == 1
    assert model.distribution([1])[2] == model.distribution([1])[3]


def test_bigrams_have_one_discount_and_trigrams_three_unless_told():
    data = flat([[0, 1]])
    assert [KneserNey(*data, V, order=order).modified for order in (2, 3)] == [False, True]
    assert KneserNey(*data, V, order=2, modified=True).modified


def test_more_context_and_more_data_help_on_a_text_with_structure():
    rng = np.random.default_rng(0)
    rule = rng.integers(0, 20, (20, 20))

    def sample(length):
        tokens = [0, 1]
        for _ in range(length):
            tokens.append(int(rule[tokens[-2], tokens[-1]]) if rng.random() < 0.8 else int(rng.integers(20)))
        return flat([tokens])

    held_out = sample(3000)
    small, large = sample(1000), sample(20000)
    nats = [KneserNey(*large, 20, order=order).nats_per_token(*held_out) for order in (1, 2, 3)]
    assert nats[2] < nats[1] - 0.5 and nats[1] < nats[0]
    assert nats[2] < KneserNey(*small, 20).nats_per_token(*held_out) - 0.2


def test_large_vocabularies_fit_and_too_long_keys_are_refused():
    data = flat([[0, 60000, 1, 60000]])
    assert KneserNey(*data, 256_000).nats_per_token(*data) > 0
    with pytest.raises(ValueError, match=r"order: got 4 for a vocabulary of 256000"):
        KneserNey(*data, 256_000, order=4)


def test_nothing_to_predict_is_an_error():
    with pytest.raises(ValueError, match="two tokens or more"):
        KneserNey(*flat([[1], [2]]), V)
    with pytest.raises(ValueError, match="nothing to score"):
        KneserNey(*flat([[1, 2]]), V).nats_per_token(*flat([[1]]))
