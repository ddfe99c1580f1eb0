"""The retrieval model by construction: exact, spread over many tokens, and only through what it looks up."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from experiments import _retrieval_model as built
from jaxllm import KVCache
from jaxllm.batch import PackedBatch
from jaxllm.model import functional


@functools.cache
def model():
    return built.retrieval_model()


@pytest.mark.parametrize("task", built.TASKS)
def test_it_answers_every_question(task):
    sample = built.TASKS[task](np.random.default_rng(3), 1024, 8)
    prompts = [[*sample.context, *sample.lead, *question] for question, _, _ in sample.questions]
    outputs = jaxllm.generate(model(), prompts, max_new_tokens=1)
    assert [out.token_ids for out in outputs] == [answer for _, answer, _ in sample.questions]


def test_the_answer_comes_from_the_pair():
    """With another value in its place the answer is the other value: nothing else decides."""
    sample = built.recall(np.random.default_rng(4), 256, 4)
    (question, (answer,), _), *_ = sample.questions
    other = built.FIRST_VALUE + (answer - built.FIRST_VALUE + 1) % built.VALUES
    changed = list(sample.context)
    changed[changed.index(question[-1]) + 1] = other
    outputs = jaxllm.generate(model(), [[*changed, *question]], max_new_tokens=1)
    assert outputs[0].token_ids == [other]


def test_the_matching_heads_spread_their_attention():
    """A sharp KV head and a diffuse one, and neither on one token alone."""
    rng = np.random.default_rng(5)
    sample = built.recall(rng, 2048, 8)
    own = {name: np.asarray(leaf) for name, leaf in functional.flatten(model().params).items()}
    codes = own["embed.weight"][:, : built.CODE].reshape(-1, built.KV_HEADS, built.PART)
    text = np.array(sample.context)
    for head in range(built.KV_HEADS):
        found = []
        for question, _, _ in sample.questions:
            cosines = codes[text[:-1], head] @ codes[question[-1], head] * built.KV_HEADS
            weights = np.exp(np.array(built.MATCH[head])[:, None] * cosines)
            share = weights[:, text[:-1] == question[-1]].sum(axis=1) / weights.sum(axis=1)
            found.append(share)
        mean = np.mean(found, axis=0)
        assert (mean > 0.3).all() and (mean < 0.999).all()
        spread = mean if head == 0 else spread - mean
    assert (spread > 0.02).all()


def test_the_first_layer_looks_one_position_back():
    """What it writes beside a token's code is the code of the token before, far into a text as well."""
    tokens = np.random.default_rng(6).integers(0, built.VOCABULARY, 40)
    start = 131_000
    module = functional.merge(model().cfg, model().params)
    batch = PackedBatch.from_rows(tokens[None], offset=start)
    h = module.embed(batch.tokens, module.context())
    block = module.layers[0]
    after = h + block.mixer(block.norm(h), batch, module.context())[0]
    written = np.asarray(after[0, 1:, built.BEFORE : built.BEFORE + built.CODE])
    wanted = np.asarray(h[0, :-1, built.OWN : built.OWN + built.CODE])
    np.testing.assert_allclose(written, wanted, atol=0.02)
    assert not jnp.any(after[0, :, built.FOUND : built.CONSTANT])


@pytest.mark.slow
def test_it_is_exact_with_quantised_keys_and_values():
    sample = built.recall(np.random.default_rng(7), 1024, 8)
    prompts = [[*sample.context, *question] for question, _, _ in sample.questions]
    outputs = jaxllm.generate(model(), prompts, max_new_tokens=1, kv=KVCache("int8"))
    assert [out.token_ids for out in outputs] == [answer for _, answer, _ in sample.questions]
