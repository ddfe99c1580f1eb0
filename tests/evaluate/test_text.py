"""Bits per byte and perplexity against one forward pass per window, and the five-fold indifference to packing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import ConfigError, PackedBatch
from jaxllm.evaluate import perplexity, score_documents, score_windows
from jaxllm.evaluate.windows import Window, strided_windows
from tests.evaluate.tiny import TEXTS


@jax.jit
def _log_probabilities(module, tokens):
    return jax.nn.log_softmax(module(PackedBatch.from_rows(tokens)))


def alone(lm, window):
    """(nll, greedy) of a window's scored tokens by one plain forward pass."""
    log_probs = np.asarray(_log_probabilities(lm.module, jnp.asarray(window.tokens)[None]))[0]
    scored = np.arange(window.first, len(window.tokens))
    return -log_probs[scored - 1, window.tokens[scored]], log_probs[scored - 1].argmax(-1) == window.tokens[
        scored
    ]


def documents(lm):
    return [np.array([lm.tokenizer.bos_id, *lm.tokenizer.encode(text, eos=True)]) for text in TEXTS]


@pytest.mark.parametrize("step_tokens", [64, 4096])
def test_packed_windows_score_as_they_do_alone(lm, step_tokens):
    windows = [w for ids in documents(lm) for w in strided_windows(ids, 48, 24)]
    for got, window in zip(score_windows(lm, windows, step_tokens=step_tokens), windows, strict=True):
        nll, greedy = alone(lm, window)
        np.testing.assert_allclose(got.nll, nll, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(got.greedy, greedy)


def test_bits_per_byte_count_every_token_and_byte_once(lm):
    result = score_documents(lm, [*TEXTS, ""], window=4096)
    ids = documents(lm)
    expected = sum(alone(lm, Window(each, 1))[0].sum() for each in ids)
    assert result.documents == len(TEXTS)
    assert result.tokens == sum(len(each) - 1 for each in ids)
    assert result.bytes == sum(len(text.encode()) for text in TEXTS)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / result.bytes, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected / result.tokens), rel=1e-4)


def test_long_documents_lose_context_but_no_token(lm):
    whole = score_documents(lm, TEXTS, window=4096)
    cut = score_documents(lm, TEXTS, window=32, stride=16)
    assert cut.tokens == whole.tokens
    assert cut.nll != whole.nll
    assert cut.to_dict()["stride"] == 16


def test_groups_do_not_change_the_sum(lm, monkeypatch):
    whole = score_documents(lm, TEXTS, window=32)
    monkeypatch.setattr("jaxllm.evaluate.text._GROUP_TOKENS", 40)
    assert score_documents(lm, TEXTS, window=32).nll == pytest.approx(whole.nll, rel=1e-6)


def test_perplexity_is_exact_where_the_stride_is_one(lm):
    ids = documents(lm)[0]
    result = perplexity(lm, ids, window=8, stride=1)
    expected = [alone(lm, Window(ids[max(0, t - 7) : t + 1], min(t, 7)))[0][-1] for t in range(1, len(ids))]
    assert result.nll == pytest.approx(sum(expected), rel=1e-5)
    assert result.bits_per_byte is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: score_documents(lm, ["", ""]), "documents"),
        (lambda lm: perplexity(lm, [1]), "documents"),
        (lambda lm: perplexity(lm, [1, 10**6]), "ids from 1 to 1000000"),
        (lambda lm: perplexity(lm, [1, 2], window=1), "window=1"),
        (lambda lm: score_documents(type(lm)(lm.cfg, lm.params), ["a"]), "tokenizer"),
    ],
)
def test_mistakes_are_named(lm, call, message):
    with pytest.raises(ConfigError, match=message):
        call(lm)
