"""Batches of the long-context models: exact by step, aligned with their weights, resumable."""

import json

import jax
import numpy as np
import pytest

from experiments.long_batches import (
    VOCABULARY,
    WEIGHTS,
    CurriculumBatches,
    Stage,
    byte_tokenizer,
    document_row,
)
from experiments.long_scores import wilson
from experiments.long_tasks import PIECES
from jaxllm import ConfigError

STAGES = (Stage(128, 3, 2, (0.5, 0.5, 0.0)), Stage(160, 2, 2, (0.2, 0.3, 0.5)))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_tokenizer_has_a_token_per_byte(tokenizer):
    text = "def f(x):\n    return 'é'  # @Qab"
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == VOCABULARY
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", PIECES)
def test_weights_lie_on_the_characters_they_are_for(tokenizer, kind):
    tokens, weights = document_row(np.random.default_rng(5), kind, 200, tokenizer)
    assert tokens.shape == (201,) and weights.shape == (200,) and tokens[0] == tokenizer.bos_id
    pieces = PIECES[kind](np.random.default_rng(5), 200)
    for name, weight in WEIGHTS.items():
        expected = "".join(piece.text for piece in pieces if piece.kind == name)
        assert tokenizer.decode(tokens[1:][weights == np.float32(weight)].tolist()) == expected


def test_batches_are_a_function_of_seed_and_step(tokenizer):
    ahead, behind = CurriculumBatches(tokenizer, STAGES), CurriculumBatches(tokenizer, STAGES)
    batches = [next(ahead) for _ in range(5)]
    assert [batch.shape for batch in batches] == [(3, 128)] * 2 + [(2, 160)] * 3
    assert not equal(batches[0], batches[1])
    assert not equal(batches[0], CurriculumBatches(tokenizer, STAGES, seed=1).batch_at(0))
    next(behind)
    resumed = CurriculumBatches(tokenizer, STAGES)
    resumed.restore(json.loads(json.dumps(behind.state())))
    assert all(equal(next(resumed), batch) for batch in batches[1:])


def test_targets_are_the_next_tokens(tokenizer):
    batch = CurriculumBatches(tokenizer, STAGES).batch_at(0)
    assert np.array_equal(batch.targets[:, :-1, 0], batch.tokens[:, 1:])
    assert np.array_equal(batch.positions[1], np.arange(128))


def test_a_state_of_other_stages_is_refused(tokenizer):
    state = CurriculumBatches(tokenizer, STAGES).state()
    with pytest.raises(ConfigError, match="stages"):
        CurriculumBatches(tokenizer, STAGES[:1]).restore(state)


def test_shares_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="mix"):
        Stage(128, 1, 1, (0.5, 0.6, 0.1))


def test_wilson_against_published_values():
    # Newcombe 1998 (Statistics in Medicine 17), table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)
