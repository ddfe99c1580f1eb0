"""``jaxllm.generate``."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from jaxllm.cache.kv import KVCache
from jaxllm.cache.policies.base import Policy
from jaxllm.cache.state import cache_groups
from jaxllm.config import ModelConfig, require
from jaxllm.generation.admission import pool_sizes
from jaxllm.generation.buckets import multiple, power_of_two
from jaxllm.generation.budget import Marker, ThinkingBudget, prompt_budgets, sequence_width
from jaxllm.generation.checks import check_room
from jaxllm.generation.engine import LEAST_BOUND, Engine
from jaxllm.generation.engine_config import EngineConfig
from jaxllm.generation.kv_report import KVReport
from jaxllm.generation.pool import borrowed
from jaxllm.generation.request import Event, SamplingParams
from jaxllm.generation.results import Answer, StreamEvent
from jaxllm.model import functional
from jaxllm.model.functional import LanguageModel
from jaxllm.model.hybrid import HybridLM

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]

# How models of the Nemotron, Qwen and DeepSeek families mark thinking.
THINKING_MARKERS = ("<think>", "</think>")

# Steps of one call where nobody waits for single tokens; the call ends early when all rows have ended.
STEPS_PER_CALL = 32


def generate(
    model: LanguageModel | HybridLM,
    prompts: Prompts,
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    thinking_budget: int | None = None,
    thinking_grace: int = 0,
    thinking_close: Marker | None = None,
    thinking_markers: tuple[Marker, Marker] = THINKING_MARKERS,
    kv: KVCache | None = None,
    policy: Policy | None = None,
    kv_report: KVReport | None = None,
    max_batch: int = 8,
    chunk: int = 512,
    steps_per_call: int | None = None,
    stream: bool = False,
) -> Any:
    """Continue prompts.

    Args:
        model: a :class:`LanguageModel` (``jaxllm.load``) or an NNX module; only the former has a tokenizer.
        prompts: one prompt or several, each text or token ids. Text is encoded with the begin token in front where
            the tokenizer has one (unless its configuration says ``add_bos_token: false``).
        max_new_tokens: most tokens to sample for each prompt.
        min_new_tokens: stop ids are impossible before this many tokens.
        temperature: 0, the default, takes the most likely token each time; above 0 tokens are drawn.
        top_k: draw from the k most likely tokens; None: all.
        top_p: draw from the smallest set whose probability reaches this, in (0, 1]; None: all.
        min_p: draw from tokens at least this times as likely as the most likely one, in [0, 1]; None: all.
        repetition_penalty: above 1 makes tokens of prompt and output less likely; 1 is none.
        presence_penalty: subtracted from the logit of every token of the output, in [-2, 2].
        frequency_penalty: subtracted once for each occurrence in the output, in [-2, 2].
        seed: prompt i draws with seed + i. Batch size, queueing and streaming do not change the draw.
        stop: text that ends an answer; it is cut off.
        stop_token_ids: tokens that end an answer, beside the tokenizer's end token.
        ignore_eos: do not end at the tokenizer's end token.
        logprobs: report log-probabilities of the chosen tokens and of this many most likely ones.
        thinking_budget: in prompts that end with what opens thinking, tokens after which thinking is closed by force;
            negative: unlimited, thinking is only counted; None: not looked at. Other prompts are not touched.
        thinking_grace: closing waits this many tokens for one with a newline. Without a tokenizer no token has one.
        thinking_close: what is forced, text or token ids; it holds the end of thinking. None: that alone.
        thinking_markers: what opens and what ends thinking, text or token ids. The model's own end is found as the
            token ids of the marker: where these are several that merge with their neighbours, it can be missed.
        kv: how keys and values are kept: dtype, pages, and the pool that prompts may share. Prefixes of earlier calls
            with the same model and sizes are found again.
        policy: what attention reads of them in each step, and which stay (:mod:`jaxllm.cache.policies`); None:
            everything.
        kv_report: filled with what decoding holds and reads of the cache; with ``stream`` as the events are read.
        max_batch: prompts decoded at once; the others queue.
        chunk: longest piece of a prompt that one call reads.
        steps_per_call: decode steps between two looks at the result; None: 1 when streaming, else 32. Tokens do not
            depend on it.
        stream: return an iterator of :class:`StreamEvent` instead of the results.

    Returns:
        list[GenerationResult], one per prompt in their order; with ``stream``, Iterator[StreamEvent], which does the
        work as it is read.

    Raises:
        ConfigError: an argument is not as above; the message names it. Nothing has run by then.
    """
    started = time.perf_counter()
    if isinstance(model, LanguageModel):
        cfg, params, tokenizer = model.cfg, model.params, model.tokenizer
    else:
        cfg, params = functional.split(model)
        tokenizer = None
    ids = _prompt_ids(cfg, tokenizer, prompts)
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    require(
        all(isinstance(s, str) and s for s in stops),
        "stop",
        stop,
        "must be None, a string or strings, none of them empty",
    )
    require(
        not stops or tokenizer is not None, "stop", stop, "needs a model with a tokenizer; use stop_token_ids"
    )
    require(
        steps_per_call is None or steps_per_call >= 1,
        "steps_per_call",
        steps_per_call,
        "must be None or at least 1",
    )
    require(max_batch >= 1, "max_batch", max_batch, "must be at least 1")
    require(chunk >= 1, "chunk", chunk, "must be at least 1")
    # Vocabularies are padded to round sizes; ids that the tokenizer lacks spell nothing and must not be sampled.
    vocab = min(cfg.vocab_size, getattr(tokenizer, "vocab_size", cfg.vocab_size))
    outside = [token for token in stop_token_ids if not 0 <= token < cfg.vocab_size]
    require(not outside, "stop_token_ids", outside[:1], f"token ids must be from 0 to {cfg.vocab_size - 1}")
    require(
        logprobs is None or logprobs <= vocab,
        "logprobs",
        logprobs,
        f"must be at most the vocabulary of {vocab}",
    )
    eos = getattr(tokenizer, "eos_id", None)
    ending = dict.fromkeys(stop_token_ids)
    if eos is not None and eos < vocab and not ignore_eos:
        ending[eos] = None
    common = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=float(temperature),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=float(repetition_penalty),
        presence_penalty=float(presence_penalty),
        frequency_penalty=float(frequency_penalty),
        seed=seed,
        stop_token_ids=tuple(ending),
        logprobs=logprobs,
    )
    thinking: list[ThinkingBudget | None] = [None] * len(ids)
    if thinking_budget is None:
        require(thinking_grace == 0, "thinking_grace", thinking_grace, "needs a thinking_budget")
        require(thinking_close is None, "thinking_close", thinking_close, "needs a thinking_budget")
    else:
        thinking = prompt_budgets(
            tokenizer, ids, thinking_budget, thinking_grace, thinking_close, thinking_markers, vocab
        )
    requests = [
        replace(common, seed=(seed + index) % 2**32, thinking=budget) for index, budget in enumerate(thinking)
    ]
    thinking_width = sequence_width(thinking)
    kv, policy = kv or KVCache(), policy or Policy()
    capacity = power_of_two(max(map(len, ids)) + max_new_tokens, LEAST_BOUND)
    page = kv.pages_of(policy)
    config = EngineConfig(
        slots=power_of_two(min(max_batch, len(ids))) if max_batch >= power_of_two(len(ids)) else max_batch,
        capacity=capacity if page is None else multiple(capacity, page),
        kv=kv,
        policy=policy,
        stored=None if page is None else _stored(cfg, policy, capacity, ids, max_new_tokens),
        chunk=chunk,
        stop_width=power_of_two(len(ending), 4),
        penalties=common.features.penalties,
        vocab_limit=vocab if vocab < cfg.vocab_size else None,
        thinking_width=power_of_two(thinking_width, 4) if thinking_width else 0,
        newline_ids=tokenizer.newline_ids if thinking_width and tokenizer is not None else frozenset(),
        taps=frozenset() if kv_report is None else kv_report.taps(cfg),
    )
    pool = pool_sizes(cfg, config)
    for prompt in ids:
        check_room(cfg, config, pool, len(prompt), max_new_tokens)
    k = steps_per_call or (1 if stream else STEPS_PER_CALL)
    answers = [
        Answer(i, len(prompt), tokenizer, stops, None if budget is None else budget.end, started)
        for i, (prompt, budget) in enumerate(zip(ids, thinking))
    ]
    events = _run(cfg, params, config, ids, requests, answers, k, kv_report)
    if stream:
        return events
    results = {event.index: event.result for event in events if event.result is not None}
    return [results[index] for index in range(len(ids))]


def _stored(
    cfg: ModelConfig, policy: Policy, capacity: int, ids: list[list[int]], new: int
) -> tuple[int, ...]:
    """Most tokens that a slot stores in every cache group; a prompt is stored whole until it has been read."""
    rules, _ = cache_groups(cfg, policy)
    most = (
        capacity
        if rule is None
        else power_of_two(max(max(len(prompt), rule.stored(len(prompt), new)) for prompt in ids), LEAST_BOUND)
        for rule in rules
    )
    return tuple(min(each, capacity) for each in most)


def _run(
    cfg: ModelConfig,
    params: Any,
    config: EngineConfig,
    ids: list[list[int]],
    requests: list[SamplingParams],
    answers: list[Answer],
    k: int,
    report: KVReport | None,
) -> Iterator[StreamEvent]:
    with borrowed(cfg, params, config) as engine:
        if report is not None:
            report.begin(cfg, engine.cache)
        owners = {
            engine.add(prompt, params): answer for prompt, params, answer in zip(ids, requests, answers)
        }
        while engine.busy:
            events = engine.step(k)
            if report is not None and engine.report is not None:
                report.add(*engine.report)
            yield from _told(engine, events, owners)


def _told(engine: Engine, events: list[Event], owners: dict[int, Answer]) -> Iterator[StreamEvent]:
    now = time.perf_counter()
    for event in events:
        answer = owners[event.request]
        if answer.done:
            continue
        told = answer.take(event, now)
        if answer.done and event.finish_reason is None:
            engine.cancel(event.request)
        yield told


def _prompt_ids(cfg: ModelConfig, tokenizer: Any, prompts: Prompts) -> list[list[int]]:
    """Token ids of every prompt, checked."""
    if isinstance(prompts, str):
        prompts = [prompts]
    require(len(prompts) > 0, "prompts", prompts, "must hold at least one prompt")
    if all(not isinstance(prompt, str | Sequence) and _is_id(prompt) for prompt in prompts):
        prompts = [list(prompts)]  # type: ignore[list-item]
    ids = []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        if isinstance(prompt, str):
            require(
                tokenizer is not None, name, prompt, "text needs a model with a tokenizer; give token ids"
            )
            require(bool(prompt), name, prompt, "must not be empty")
            bos = tokenizer.config.get("add_bos_token", True) is not False
            prompt = tokenizer.encode(prompt, bos=bos)
        require(not isinstance(prompt, int), name, prompt, "must be text or a list of token ids")
        prompt = [int(token) for token in prompt]  # type: ignore[union-attr]
        require(len(prompt) > 0, name, prompt, "must not be empty")
        outside = [token for token in prompt if not 0 <= token < cfg.vocab_size]
        require(not outside, name, outside[:1], f"token ids must be from 0 to {cfg.vocab_size - 1}")
        ids.append(prompt)
    return ids


def _is_id(value: Any) -> bool:
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0
