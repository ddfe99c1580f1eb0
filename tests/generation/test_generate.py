"""``jaxllm.generate``: what it gives does not depend on how the work was cut up."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.batch import PackedBatch
from jaxllm.cache.kv import KVCache
from jaxllm.config import GatedDeltaConfig, JetConfig
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.generation import steps
from jaxllm.generation.engine import Engine
from jaxllm.generation.engine_config import EngineConfig
from jaxllm.generation.request import SamplingParams
from jaxllm.generation.text import TextStream
from jaxllm.model.functional import LanguageModel, map_named, merge
from tests.generation.conftest import hybrid, parameters

VOCAB = 61
PAGED = KVCache(page_size=8)
DRAWN = dict(temperature=1.0, top_k=30, top_p=0.95, min_p=0.01, seed=3)


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def ids(results):
    return [r.token_ids for r in results]


def check_greedy(full, prompt, tokens):
    """Each token is the argmax of the whole forward, up to a tie within rounding."""
    logits = full(prompt + tokens[:-1])[len(prompt) - 1 :]
    chosen = logits[np.arange(len(tokens)), tokens]
    assert (logits.max(axis=-1) - chosen).max() < 1e-4


class Words:
    """A tokenizer whose ids spell fixed strings, so that answers can be forced to any text."""

    def __init__(self, table):
        self.table, self.config, self.eos_id = table, {}, None

    def encode(self, text, *, bos=False):
        return [ord(c) % VOCAB for c in text]

    def stream(self):
        return SimpleNamespace(push=lambda token: self.table[token % len(self.table)], flush=lambda: "")


def test_greedy_equals_the_full_forward(lm, full):
    asked = prompts(3, 11, 15)
    for prompt, result in zip(asked, jaxllm.generate(lm, asked, max_new_tokens=12)):
        assert len(result.token_ids) == 12 and result.prompt_tokens == len(prompt)
        check_greedy(full, prompt, result.token_ids)


@pytest.mark.parametrize(
    "how",
    [dict(max_batch=1, steps_per_call=1), dict(max_batch=2, steps_per_call=3, chunk=4, kv=PAGED)],
    ids=["one slot, single steps", "two slots, chunks through the window, pages"],
)
def test_cutting_the_work_differently_draws_the_same_tokens(lm, how):
    """Queueing, fewer slots, other slots, steps per call, chunked prefill through a window layer, and pages."""
    asked = prompts(5, 2, 13)
    assert ids(jaxllm.generate(lm, asked, max_new_tokens=9, **DRAWN, **how)) == ids(
        jaxllm.generate(lm, asked, max_new_tokens=9, **DRAWN)
    )


def test_order_does_not_matter(lm):
    asked = prompts(5, 2, 13)
    params = [SamplingParams(max_new_tokens=8, **DRAWN | dict(seed=s)) for s in (4, 5, 6)]

    def run(order):
        engine = Engine(lm.cfg, lm.params, EngineConfig(2, 64, PAGED, chunk=4))
        owner = {engine.add(asked[i], params[i]): i for i in order}
        answers = {i: [] for i in order}
        while engine.busy:
            for event in engine.step(3):
                answers[owner[event.request]].append(event.token)
        return answers

    assert run([0, 1, 2]) == run([2, 1, 0])


def test_a_used_slot_leaves_nothing_behind(lm):
    engine = Engine(lm.cfg, lm.params, EngineConfig(1, 64, KVCache()))

    def answer(prompt, tokens):
        engine.add(prompt, SamplingParams(max_new_tokens=tokens, **DRAWN))
        answer = []
        while engine.busy:
            answer += [event.token for event in engine.step()]
        return answer

    long, short = prompts(14, 4)
    fresh = answer(short, 6)
    assert answer(long, 20) and answer(short, 6) == fresh


def test_layers_of_the_delta_rule_generate_what_the_full_forward_says():
    """Three prompts through two slots, in chunks shorter than a prompt: slots are shared, left and taken again."""
    delta = GatedDeltaConfig(2, 4, key_head_dim=6, value_head_dim=8, chunk_size=8)
    jet = JetConfig(2, key_head_dim=6, value_head_dim=12, chunk_size=8)
    cfg = hybrid("M").replace(pattern="G-J", delta=delta, jet=jet)
    # A fresh kernel generator is silent.
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda v: v + 0.1 * noise.standard_normal(v.shape).astype(v.dtype), parameters(cfg))
    engine = Engine(cfg, params, EngineConfig(2, 64, KVCache(), chunk=4))
    asked = prompts(3, 11, 9)
    owner = {engine.add(prompt, SamplingParams(max_new_tokens=6)): i for i, prompt in enumerate(asked)}
    answers = [[] for _ in asked]
    while engine.busy:
        for event in engine.step():
            answers[owner[event.request]].append(event.token)
    forward = jax.jit(lambda tokens: merge(cfg, params)(PackedBatch.from_rows(tokens)))

    def full(tokens):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(padded))[0, : len(tokens)]

    for prompt, answer in zip(asked, answers):
        assert len(answer) == 6
        check_greedy(full, prompt, answer)


def test_streaming_equals_not_streaming(lm):
    (asked,) = prompts(6)
    (whole,) = jaxllm.generate(lm, asked, max_new_tokens=7, logprobs=2, **DRAWN)
    events = list(jaxllm.generate(lm, asked, max_new_tokens=7, logprobs=2, stream=True, **DRAWN))
    assert [e.token_id for e in events] == whole.token_ids
    # Calls of one step and of many are two programs: their sums may round differently.
    np.testing.assert_allclose([e.logprob for e in events], whole.logprobs, atol=2e-5)
    assert [e.result is not None for e in events] == [False] * 6 + [True]
    assert events[-1].result.token_ids == whole.token_ids


def test_logprobs_are_the_models_own(lm, full):
    (prompt,) = prompts(6)
    (result,) = jaxllm.generate(lm, prompt, max_new_tokens=5, logprobs=2, **DRAWN)
    expected = np.asarray(jax.nn.log_softmax(full(prompt + result.token_ids[:-1])[5:], axis=-1))
    np.testing.assert_allclose(result.logprobs, expected[np.arange(5), result.token_ids], atol=1e-4)
    for row, top in zip(expected, result.top_logprobs):
        np.testing.assert_allclose([p for _, p in top], -np.sort(-row)[:2], atol=1e-4)


def test_stop_ids_and_the_minimum_length(lm):
    (prompt,) = prompts(6)
    (free,) = jaxllm.generate(lm, prompt, max_new_tokens=10, **DRAWN)
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    (ended,) = jaxllm.generate(lm, prompt, max_new_tokens=10, stop_token_ids=[stop], **DRAWN)
    assert ended.token_ids == free.token_ids[: first + 1] and ended.finish_reason == "stop"
    (longer,) = jaxllm.generate(
        lm, prompt, max_new_tokens=10, min_new_tokens=8, stop_token_ids=[stop], **DRAWN
    )
    assert stop not in longer.token_ids[:8] and len(longer.token_ids) >= 8
    assert free.finish_reason == "length"


def test_the_tokenizers_end_token_ends_unless_ignored(lm):
    (prompt,) = prompts(6)
    words = Words(["a"])
    (free,) = jaxllm.generate(lm, prompt, max_new_tokens=10, **DRAWN)
    words.eos_id = free.token_ids[3]
    told = replace(lm, tokenizer=words)
    (ended,) = jaxllm.generate(told, prompt, max_new_tokens=10, **DRAWN)
    assert ended.finish_reason == "stop" and ended.token_ids[-1] == words.eos_id and len(ended.token_ids) <= 4
    (ignored,) = jaxllm.generate(told, prompt, max_new_tokens=10, ignore_eos=True, **DRAWN)
    assert ignored.token_ids == free.token_ids


@pytest.fixture(scope="module")
def padded():
    """A model with more ids than its tokenizer, whose head likes two of the others best whatever it has read."""
    tokenizer = Tokenizer.train(["no text"], 259)
    cfg = hybrid("M*").replace(vocab_size=320)

    def favour(name, value):
        if name != "lm_head.weight":
            return value
        return value.at[:, 300].set(500 * value[:, 0]).at[:, 301].set(-500 * value[:, 0])

    return LanguageModel(cfg, map_named(favour, parameters(cfg)), tokenizer)


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
def test_ids_that_the_tokenizer_lacks_are_never_sampled(padded, options):
    (prompt,) = prompts(5)
    forward = jax.jit(lambda params, batch: merge(padded.cfg, params)(batch))
    logits = forward(padded.params, PackedBatch.from_rows(np.asarray([prompt], np.int32)))[0, -1]
    assert np.argmax(logits) in (300, 301) and padded.tokenizer.vocab_size == 259
    (result,) = jaxllm.generate(padded, prompt, max_new_tokens=6, logprobs=3, ignore_eos=True, **options)
    assert len(result.token_ids) == 6 and max(result.token_ids) < 259
    assert all(len(top) == 3 and max(i for i, _ in top) < 259 for top in result.top_logprobs)
    # Log-probabilities count the whole vocabulary all the same.
    expected = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(result.logprobs[0], expected[result.token_ids[0]], atol=1e-4)
    assert result.top_logprobs[0][0][0] == np.argmax(logits[:259])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_across_tokens_and_are_cut(lm, stream):
    """Every token spells "abc": "ca" lies across two of them."""
    told = replace(lm, tokenizer=Words(["abc"]))
    out = jaxllm.generate(told, prompts(6), max_new_tokens=10, stop=["zz", "ca"], stream=stream, **DRAWN)
    if stream:
        events = list(out)
        assert "".join(event.text for event in events) == "ab"
        out = [event.result for event in events if event.result]
    (result,) = out
    assert (result.text, result.finish_reason, len(result.token_ids)) == ("ab", "stop", 2)
    (after,) = jaxllm.generate(told, prompts(6), max_new_tokens=3, **DRAWN)
    assert (after.text, after.finish_reason) == ("abcabcabc", "length")


def test_held_back_text_comes_out_when_no_stop_follows():
    stream = TextStream(Words(["a", "b", "x"]), ("abc",))
    pieces = [stream.push(0), stream.push(1), stream.push(2), stream.push(0), stream.flush()]
    assert pieces == ["", "", "abx", "", "a"] and stream.text == "abxa" and not stream.stopped


def test_penalties_act(lm):
    """Strong ones: no token of the prompt, and none twice, where the plain answer has both."""
    (prompt,) = prompts(6)
    strong = dict(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=50.0)
    (penalised,) = jaxllm.generate(lm, prompt, max_new_tokens=20, **strong)
    assert len({*prompt, *penalised.token_ids}) == len(set(prompt)) + 20


def test_a_repeated_call_compiles_nothing(lm):
    def run(*lengths, seed):
        jaxllm.generate(lm, prompts(*lengths, seed=seed), max_new_tokens=9, **DRAWN)

    run(5, 2, 13, seed=1)
    before, compiled = steps.compiled_programs(), []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(count)
    run(7, 3, 11, seed=2)
    assert steps.compiled_programs() == before and not compiled
    run(7, 3, 40, seed=2)
    assert steps.compiled_programs() > before and compiled, "the counters must see a new bucket"


def test_an_abandoned_stream_does_not_disturb_the_next(lm):
    (asked,) = prompts(6)

    def whole():
        return ids(jaxllm.generate(lm, asked, max_new_tokens=7, **DRAWN))

    expected = whole()
    stream = jaxllm.generate(lm, asked, max_new_tokens=7, stream=True, **DRAWN)
    next(stream)
    assert whole() == expected
    stream.close()
    assert whole() == expected


def test_cancelled_requests_free_their_slot(lm):
    engine = Engine(lm.cfg, lm.params, EngineConfig(1, 64, KVCache()))
    first, second = (engine.add(p, SamplingParams(max_new_tokens=9, **DRAWN)) for p in prompts(4, 5))
    engine.step()
    engine.cancel(first)
    events = []
    while engine.busy:
        events += engine.step()
    assert {event.request for event in events} == {second} and len(events) == 9


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ([], {}, "prompts"),
        ([[]], {}, r"prompts\[0\]"),
        ([[1], [VOCAB]], {}, r"prompts\[1\]"),
        ([[-1]], {}, r"prompts\[0\]"),
        ("text", {}, r"prompts\[0\]"),
        ([1], dict(top_p=0.0), "top_p"),
        ([1], dict(stop="x"), "stop"),
        ([1], dict(stop_token_ids=[VOCAB]), "stop_token_ids"),
        ([1], dict(max_batch=0), "max_batch"),
        ([1], dict(steps_per_call=0), "steps_per_call"),
    ],
)
def test_wrong_arguments_are_named(lm, prompt, options, named):
    with pytest.raises(ValueError, match=f"^{named}="):
        jaxllm.generate(lm, prompt, **options)


def test_what_does_not_fit_an_engine_is_refused_before_any_step(lm):
    engine = Engine(lm.cfg, lm.params, EngineConfig(1, 16, KVCache()))
    with pytest.raises(ValueError, match="capacity of 16"):
        engine.add([1] * 10, SamplingParams(max_new_tokens=7))
    with pytest.raises(ValueError, match="penalties"):
        engine.add([1], SamplingParams(max_new_tokens=7, presence_penalty=1.0))
    assert not engine.busy


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        jaxllm.load(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        jaxllm.load(tmp_path / "absent")
