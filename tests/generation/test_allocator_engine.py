"""Requests that share a pool of pages: the tokens of private pools, whoever waits, leaves, comes back or shares."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxllm
from jaxllm import RKV, KVCache, Pillar, Policy, Quest, Tactic
from jaxllm.cache.audit import check, usage
from jaxllm.cache.sizes import OutOfPages
from jaxllm.config import ConfigError
from jaxllm.generation import engine as engines
from jaxllm.generation import pool
from jaxllm.generation.admission import SharedPages
from jaxllm.generation.engine import Engine
from jaxllm.generation.engine_config import EngineConfig
from jaxllm.generation.request import SamplingParams
from jaxllm.model.functional import LanguageModel
from tests.generation.conftest import VOCAB, hybrid, parameters

PAGE, CHUNK, SLOTS, CAPACITY, POOL = 4, 8, 3, 64, 60
TOKENS = np.random.default_rng(7).integers(0, VOCAB, 64).tolist()
# The same features throughout: each set of them is a program of its own.
DRAWN = {"temperature": 0.8, "logprobs": 0}
SMALL_RKV = RKV(budget=12, buffer=4, window=4, kernel=3)


@dataclass
class Told:
    """What an engine told of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


@functools.cache
def params(pattern: str = "M*-W"):
    return parameters(hybrid(pattern))


@functools.cache
def engine(
    pool_tokens: int | None,
    dtype: str = "compute",
    policy: Policy | None = None,
    pattern: str = "M*-W",
    **options,
) -> Engine:
    """One engine per shape, used by many tests: what earlier ones left there must not matter."""
    kv = KVCache(dtype, PAGE, pool_tokens=pool_tokens, snapshots=4)
    config = EngineConfig(SLOTS, CAPACITY, kv, chunk=CHUNK, policy=policy or Policy(), **options)
    return Engine(hybrid(pattern), params(pattern), config)


def books(it: Engine):
    assert isinstance(it._room, SharedPages)
    return it._room.allocator


def serve(it: Engine, asked: list[tuple[list[int], int]], k: int = 5, **options) -> list[Told]:
    """Prompts with their lengths of answer; the books are right after every step, and empty in the end."""
    options = DRAWN | options
    told = {
        it.add(prompt, SamplingParams(max_new_tokens=new, seed=seed, **options)): Told()
        for seed, (prompt, new) in enumerate(asked)
    }
    while it.busy:
        for event in it.step(k):
            told[event.request].tokens.append(event.token)
            told[event.request].logprobs.append(event.logprob)
        if isinstance(it._room, SharedPages):
            check(books(it))
    if isinstance(it._room, SharedPages):
        assert not books(it).held
        assert all(each.used == 0 for each in usage(books(it)).values())
    return list(told.values())


def same(mine: list[Told], wanted: list[Told]) -> None:
    assert [each.tokens for each in mine] == [each.tokens for each in wanted]
    for a, b in zip(mine, wanted):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-4)


requests = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 24)), min_size=1, max_size=6
)


@pytest.mark.parametrize("dtype", ["compute", "int4"])
@settings(max_examples=6)
@given(drawn=requests)
def test_a_small_pool_changes_no_token(dtype, drawn):
    """Prompts begin alike (three families of them), wait for pages, and make room in mid-answer."""
    asked = [((TOKENS[family:] + TOKENS)[:length], new) for family, length, new in drawn]
    same(serve(engine(POOL, dtype), asked), serve(engine(None, dtype), asked))


@pytest.mark.parametrize("dtype", ["compute", "int4"])
def test_the_youngest_makes_room_and_goes_on_where_it_was(dtype):
    """Bit by bit, so that also quantised keys and a recurrent state are those of an undisturbed run."""
    asked = [(TOKENS[i : i + 13], 30) for i in range(3)]
    shared = engine(POOL, dtype)
    before = shared.suspensions
    same(serve(shared, asked), serve(engine(None, dtype), asked))
    assert shared.suspensions > before


@pytest.mark.parametrize("dtype", ["compute", "int4"])
def test_a_prefix_is_read_once(dtype):
    """A prompt that begins as an earlier one starts behind it, and sees nothing of what came after there."""
    shared, private = engine(POOL, dtype), engine(None, dtype)
    common = TOKENS[40:60]
    first, second = [*common, 1, 2, 3], [*common, 9, 8]
    serve(shared, [(first, 12)])
    before = shared.prompt_tokens_read
    same(serve(shared, [(second, 12)]), serve(private, [(second, 12)]))
    # 20 tokens are alike, and 16 of them end with a chunk.
    assert shared.prompt_tokens_read - before == len(second) - 16
    before = shared.prompt_tokens_read
    same(serve(shared, [(first, 12)]), serve(private, [(first, 12)]))
    assert shared.prompt_tokens_read - before == len(first) - 16


def test_chunks_are_fresh_where_every_row_begins(monkeypatch):
    """Not those behind a prefix that another request has left, nor rows of which one goes on."""
    told = []

    def prefill(params, batch, *rest, fresh, **static):
        told.append((fresh, batch.positions[:, 0].tolist()))
        return plain(params, batch, *rest, fresh=fresh, **static)

    plain = engines.prefill
    monkeypatch.setattr(engines, "prefill", prefill)
    shared = engine(POOL)
    prompt = [11, 12, 13, 14, 15] * 4
    serve(shared, [(prompt, 1), (prompt[1:4], 1)])
    serve(shared, [(prompt, 1)])
    assert [fresh for fresh, _ in told] == [not any(starts) for _, starts in told]
    assert {fresh for fresh, _ in told} == {True, False} and max(told[-1][1]) == 16


def test_penalties_know_a_shared_prompt():
    """Tokens that no step reads for the request count as its prompt all the same."""
    shared = engine(POOL, penalties=True)
    prompt = [4, 5, 6, 7] * 5
    first = serve(shared, [(prompt, 10)], repetition_penalty=1.9)
    read = shared.prompt_tokens_read
    again = serve(shared, [(prompt, 10)], repetition_penalty=1.9)
    assert shared.prompt_tokens_read - read == 4
    same(again, first)
    assert first[0].tokens != serve(engine(POOL), [(prompt, 10)])[0].tokens


def test_new_parameters_make_prefixes_void():
    """Pages were read with the old ones."""
    cfg = hybrid("M*-W")
    kv = KVCache(page_size=PAGE, pool_tokens=POOL, snapshots=4)
    it = Engine(cfg, params(), EngineConfig(SLOTS, CAPACITY, kv, chunk=CHUNK))
    prompt = TOKENS[:20]
    serve(it, [(prompt, 2)])
    it.params = params()
    assert books(it).prefixes.nodes
    other = parameters(cfg, 1)
    it.params = None
    it.params = other
    assert not books(it).prefixes.nodes
    fresh = Engine(cfg, other, EngineConfig(SLOTS, CAPACITY, kv, chunk=CHUNK))
    same(serve(it, [(prompt, 6)]), serve(fresh, [(prompt, 6)]))
    it.add(prompt, SamplingParams(max_new_tokens=9, **DRAWN))
    it.step(5)
    with pytest.raises(ConfigError, match=r"^params"):
        it.params = params()


def test_running_out_is_told_before_the_step_and_changes_nothing():
    """Pages that nobody can be asked to give up: the request goes on when they are back."""
    it, asked = engine(POOL), [(TOKENS[5:18], 30)]
    it.add(asked[0][0], SamplingParams(max_new_tokens=30, **DRAWN))
    told = Told()

    def step():
        for event in it.step(5):
            told.tokens.append(event.token)
            told.logprobs.append(event.logprob)

    step()
    other = books(it).admit([60] * 47).slot
    with pytest.raises(OutOfPages, match="1 pages needed, 0 of 15 free or idle"):
        while it.busy:
            step()
    check(books(it))
    assert len(told.tokens) < 30
    books(it).release(other)
    while it.busy:
        step()
    same([told], serve(engine(None), asked))


def test_a_cancelled_request_gives_everything_back():
    it = engine(POOL)
    numbers = [it.add(TOKENS[i : i + 13], SamplingParams(max_new_tokens=30, **DRAWN)) for i in range(3)]
    while not it.suspensions and it.busy:
        it.step(5)
    for number in numbers:
        it.cancel(number)
        check(books(it))
    assert not it.busy and not books(it).held
    asked = [(TOKENS[3:17], 8)]
    same(serve(it, asked), serve(engine(None), asked))


def test_memory_of_a_policy_that_evicts_is_free_for_others():
    """Its pages go back while it runs, nothing is shared, and tokens are those of private pools."""
    asked = [(TOKENS[i : i + 30], 20) for i in range(3)]
    shared, private = (engine(size, "compute", SMALL_RKV, stored=(32,)) for size in (40, None))
    most, told = 0, {}
    for seed, (prompt, new) in enumerate(asked):
        params_ = SamplingParams(max_new_tokens=new, seed=seed, **DRAWN)
        told[shared.add(prompt, params_)] = Told()
    while shared.busy:
        for event in shared.step(5):
            told[event.request].tokens.append(event.token)
            told[event.request].logprobs.append(event.logprob)
        check(books(shared))
        held = [len(each.pages[0]) for each in books(shared).held.values() if each.tokens > 30]
        most = max([most, *held])
    # 16 tokens at most between two evictions, and what one call of five steps may need beside them.
    assert 3 <= most <= (16 + 5) // PAGE
    assert not books(shared).prefixes.nodes
    same(list(told.values()), serve(private, asked))


POLICIES = {
    "Quest": Quest(budget=12, dense_layers=()),
    "Tactic": Tactic(mass=0.5, cluster=4, refresh=8, sinks=1),
    "Pillar": Pillar(budget=0.2, least=8, period=4),
}


@pytest.mark.parametrize("name", ["Quest", pytest.param("Pillar", marks=pytest.mark.nightly)])
def test_policies_go_on_from_a_shared_prefix(name):
    """Their arrays of pages come with the pages; what they keep per slot is made at the prompt's end or later."""
    shared, private = (engine(size, "compute", POLICIES[name]) for size in (POOL, None))
    asked = [([*TOKENS[:18], i, 2 * i], 24) for i in range(4)]
    serve(shared, asked[:1])
    read = shared.prompt_tokens_read
    same(serve(shared, asked), serve(private, asked))
    assert shared.prompt_tokens_read - read == sum(len(prompt) - 16 for prompt, _ in asked)
    assert shared.suspensions


@dataclass(frozen=True, kw_only=True)
class Remembering(Pillar):
    """Keeps something per slot that steps of a prompt would have to make."""

    rebuilds = False


def test_a_policy_that_must_see_the_whole_prompt_shares_nothing():
    it = engine(POOL, "compute", Remembering(budget=1.0, period=4))
    assert not books(it).sizes.shares and books(engine(POOL)).sizes.shares


@pytest.mark.slow
def test_clusters_are_not_shared_and_survive_swapping():
    """Tactic clusters a whole prompt; whether it could start from a shared prefix is not shown."""
    shared, private = (engine(size, "compute", POLICIES["Tactic"]) for size in (POOL, None))
    assert not books(shared).sizes.shares
    asked = [([*TOKENS[:18], i, 2 * i], 24) for i in range(4)]
    same(serve(shared, asked), serve(private, asked))
    assert shared.suspensions


@pytest.mark.slow
def test_plain_attention_shares_by_the_page():
    """Where nothing but pages is needed, a prefix ends at any of them."""
    shared, private = (engine(size, pattern="*-*") for size in (POOL, None))
    common = TOKENS[:14]
    serve(shared, [([*common, 1, 2, 3], 4)])
    read = shared.prompt_tokens_read
    asked = [([*common, 9], 12)]
    same(serve(shared, asked), serve(private, asked))
    assert shared.prompt_tokens_read - read == 3


def test_generate_shares_between_calls():
    model = LanguageModel(hybrid("M*-W"), params())
    pool.clear()
    prompts = [[*TOKENS[:20], i] for i in range(5)]
    options = {"max_new_tokens": 20, "max_batch": SLOTS, "chunk": CHUNK, "steps_per_call": 5, **DRAWN}
    wanted = jaxllm.generate(model, prompts, kv=KVCache(page_size=PAGE), **options)
    kv = KVCache(page_size=PAGE, pool_tokens=POOL, snapshots=4)
    for _ in range(2):
        mine = jaxllm.generate(model, prompts, kv=kv, **options)
        assert [each.token_ids for each in mine] == [each.token_ids for each in wanted]
    (it,) = [each for (_, config), each in pool._idle.items() if config.kv == kv]
    assert it.prompt_tokens_read <= 2 * sum(map(len, prompts)) - 16 * len(prompts)
    # Another model of the same sizes finds nothing there.
    other = LanguageModel(model.cfg, jax.tree.map(lambda leaf: leaf + 0, model.params))
    read = it.prompt_tokens_read
    assert jaxllm.generate(other, prompts[:3], kv=kv, **options)[0].token_ids == wanted[0].token_ids
    # Two fit the pool at once, and neither finds the other's; with old prefixes it would be 5 tokens each.
    assert it.prompt_tokens_read - read >= 21 * 2


@pytest.mark.parametrize(
    ("kv", "named"),
    [
        (KVCache(page_size=4, pool_tokens=24), "kv.pool_tokens"),
        (KVCache(page_size=16, pool_tokens=64), "chunk"),
        (KVCache(pool_tokens=24), "kv.pool_tokens"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(kv, named):
    model = LanguageModel(hybrid("M*-W"), params())
    with pytest.raises(ConfigError, match=f"^{named}"):
        jaxllm.generate(model, TOKENS[:20], kv=kv, max_new_tokens=8, chunk=CHUNK)


def test_bad_sizes_are_refused():
    for make, named in (
        (lambda: KVCache(page_size=4, pool_tokens=30), "kv.pool_tokens"),
        (lambda: KVCache(pool_tokens=0), "kv.pool_tokens"),
        (lambda: KVCache(snapshots=-1), "kv.snapshots"),
        (lambda: engine(POOL, pattern="M-"), "kv.pool_tokens"),
        (lambda: engine(POOL).add(TOKENS[:50], SamplingParams(max_new_tokens=12)), "kv.pool_tokens"),
    ):
        with pytest.raises(ConfigError, match=f"^{named}"):
            make()
