"""Sampling: agreement with Hugging Face's processors, and what makes draws independent of batching."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generation.request import SamplingParams
from jaxllm.generation.sampling import (
    Features,
    advance,
    bar_stops,
    filter_logits,
    init_sampling,
    log_softmax,
    most_likely,
    penalise,
)
from jaxllm.generation.sampling import sample as eager_sample

VOCAB = 40
sample = functools.partial(jax.jit, static_argnames="features")(eager_sample)


def state(rows: int, **values):
    base = init_sampling(rows, stop_width=2, counted_vocab=VOCAB)
    return replace(
        base, **{name: jnp.asarray(value, getattr(base, name).dtype) for name, value in values.items()}
    )


def test_filters_keep_what_arithmetic_says():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]] * 4))
    rows = state(4, top_k=[2, 0, 0, 0], top_p=[1.0, 0.7, 0.75, 1.0], min_p=[0.0, 0.0, 0.0, 0.3])
    kept = np.isfinite(np.asarray(filter_logits(logits, rows)))
    assert kept.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_filters_compose_on_what_is_left():
    """top_p counts the mass that top_k left: 0.5 / 0.75 of two tokens reaches 0.6 with the first."""
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1]]))
    kept = np.isfinite(np.asarray(filter_logits(logits, state(1, top_k=[2], top_p=[0.6]))))
    assert kept.tolist() == [[1, 0, 0, 0]]


@pytest.mark.oracle
def test_filters_agree_with_hugging_face(rng):
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for _ in range(40):
        logits = rng.normal(size=(1, VOCAB)).astype(np.float32) * 3
        temperature, k = float(rng.uniform(0.3, 2)), int(rng.integers(1, VOCAB + 1))
        p, least = float(rng.uniform(0.05, 0.999)), float(rng.uniform(0, 0.5))
        theirs = torch.tensor(logits)
        for warper in (
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(k),
            TopPLogitsWarper(p),
            MinPLogitsWarper(least),
        ):
            theirs = warper(None, theirs)
        ours = filter_logits(jnp.asarray(logits) / temperature, state(1, top_k=[k], top_p=[p], min_p=[least]))
        np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=1e-6)


@pytest.mark.oracle
def test_repetition_penalty_agrees_with_hugging_face(rng):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = rng.normal(size=(2, VOCAB)).astype(np.float32)
    prompt, output = rng.integers(0, VOCAB, (2, 6)), rng.integers(0, VOCAB, (2, 3))
    ids = torch.tensor(np.concatenate([prompt, output], axis=1))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(ids, torch.tensor(logits))
    prompted, counts = np.zeros((2, VOCAB), bool), np.zeros((2, VOCAB), np.int32)
    for row in range(2):
        prompted[row, prompt[row]] = True
        np.add.at(counts[row], output[row], 1)
    ours = penalise(jnp.asarray(logits), state(2, repetition=[1.3, 1.3], prompted=prompted, counts=counts))
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=1e-6)


def test_presence_and_frequency_follow_openai():
    """logit - count * frequency - (count > 0) * presence, over the output alone."""
    counts = np.zeros((1, VOCAB), np.int32)
    counts[0, 3], prompted = 2, np.ones((1, VOCAB), bool)
    rows = state(1, presence=[0.5], frequency=[0.25], counts=counts, prompted=prompted)
    moved = np.asarray(penalise(jnp.zeros((1, VOCAB)), rows))[0]
    assert moved[3] == -1.0 and not np.delete(moved, 3).any()


def test_draws_depend_on_seed_and_position_alone(rng):
    logits = jnp.asarray(rng.normal(size=(1, VOCAB)), jnp.float32)
    random = Features(random=True)
    seeds, positions = jnp.asarray([3, 9, 3, 3]), jnp.asarray([7, 7, 7, 8])
    rows = state(4, temperature=[1.0] * 4, seed=seeds)
    together = sample(jnp.repeat(logits, 4, axis=0), rows, positions, features=random).tokens
    for row in range(4):
        alone = sample(
            logits, rows.rows(slice(row, row + 1)), positions[row : row + 1], features=random
        ).tokens
        assert together[row] == alone[0]
    many = state(64, temperature=[1.0] * 64, seed=[5] * 64)
    flat = sample(jnp.zeros((64, VOCAB)), many, jnp.arange(64), features=random).tokens
    assert len(set(np.asarray(flat).tolist())) > 20, "positions must give different draws"


def test_draws_follow_the_distribution():
    probabilities = np.array([0.6, 0.3, 0.1], np.float32)
    n = 4000
    rows = state(n, temperature=[1.0] * n, seed=np.arange(n))
    logits = jnp.broadcast_to(jnp.log(probabilities), (n, 3))
    tokens = np.asarray(sample(logits, rows, jnp.zeros(n, jnp.int32), features=Features(random=True)).tokens)
    np.testing.assert_allclose(np.bincount(tokens, minlength=3) / n, probabilities, atol=0.035)


def test_greedy_rows_stay_greedy_beside_random_ones(rng):
    logits = jnp.asarray(rng.normal(size=(2, VOCAB)), jnp.float32)
    rows = state(2, temperature=[0.0, 1.0], top_k=[1, 0])
    tokens = sample(
        logits, rows, jnp.zeros(2, jnp.int32), features=Features(random=True, filters=True)
    ).tokens
    assert tokens[0] == jnp.argmax(logits[0])


def test_logprobs_are_of_the_raw_logits(rng):
    logits = jnp.asarray(rng.normal(size=(2, VOCAB)), jnp.float32)
    rows = state(2, temperature=[0.5, 2.0])
    drawn = sample(logits, rows, jnp.zeros(2, jnp.int32), features=Features(random=True, logprobs=3))
    expected = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(drawn.logprobs, expected[jnp.arange(2), drawn.tokens], atol=1e-6)
    np.testing.assert_allclose(drawn.top_logprobs, -np.sort(-np.asarray(expected))[:, :3], atol=1e-6)


def test_impossible_rows_give_no_nan():
    logits = jnp.full((1, VOCAB), -jnp.inf)
    rows = state(1, temperature=[1.0], top_k=[3], top_p=[0.5], min_p=[0.1])
    drawn = sample(
        logits, rows, jnp.zeros(1, jnp.int32), features=Features(random=True, filters=True, logprobs=2)
    )
    assert not any(np.isnan(np.asarray(leaf)).any() for leaf in jax.tree.leaves(drawn))
    assert 0 <= int(drawn.tokens[0]) < VOCAB
    assert np.isneginf(np.asarray(log_softmax(logits))).all()


def test_stop_ids_are_barred_at_first_only():
    rows = state(2, stop_ids=[[4, -1], [4, -1]], barred=[1, 0])
    logits = np.asarray(bar_stops(jnp.zeros((2, VOCAB)), rows))
    assert np.isneginf(logits[0, 4]) and np.isfinite(np.delete(logits[0], 4)).all()
    assert np.isfinite(logits[1]).all()


def test_rows_end_at_stop_ids_and_at_their_last_token():
    rows = state(3, live=[True] * 3, remaining=[5, 1, 5], stop_ids=[[4, 7], [-1, -1], [4, -1]])
    after = advance(rows, jnp.asarray([7, 1, 1], jnp.int32), jnp.asarray([True, True, False]), Features())
    assert after.live.tolist() == [False, False, True]
    assert after.remaining.tolist() == [4, 0, 5] and after.position.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", 200),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3.0),
        ("seed", -1),
        ("stop_token_ids", (-2,)),
        ("logprobs", 1000),
    ],
)
def test_wrong_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        SamplingParams(**{name: value})


def test_the_first_of_the_highest_is_taken(rng):
    logits = rng.integers(-3, 3, (50, 17)).astype(np.float32)
    logits[1] = -np.inf
    np.testing.assert_array_equal(most_likely(jnp.asarray(logits)), np.argmax(logits, axis=-1))
