"""Who may run where a pool is shared, case by case on the host: no step of a model is taken."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from jaxllm import RKV, KVCache, Policy, StreamingLLM
from jaxllm.cache.sizes import Group, OutOfPages, Sizes
from jaxllm.cache.state import Cache, init_cache
from jaxllm.generation.admission import SharedPages, Suspended, book_sizes, pool_sizes
from jaxllm.generation.engine_config import EngineConfig
from jaxllm.generation.request import Running, SamplingParams
from tests.generation.conftest import hybrid

PAGE = 4
NOTHING = Cache((), ())
EVICTING = RKV(budget=12, buffer=4, window=4, kernel=3)


def room(pages: int = 6, slots: int = 3) -> SharedPages:
    return SharedPages(Sizes(slots, PAGE, (Group("full", pages, min(pages, 6)),)))


def request(number: int, prompt: int, new: int) -> Running:
    """Prompts of different requests have nothing in common."""
    return Running(number, [100 * number + i for i in range(prompt)], SamplingParams(max_new_tokens=new))


def read(it: SharedPages, one: Running) -> None:
    """The whole prompt, by one step."""
    assert it.admit(one, [])
    it.flush()
    one.read, one.output = len(one.prompt), [1]
    it.settle([one], NOTHING, reading=True)


def held(it: SharedPages, one: Running) -> int:
    return len(it.allocator.held[one.slot].pages[0])


def test_a_page_stays_free_for_each_that_will_grow():
    it, first, second, third = room(), request(1, 12, 8), request(2, 12, 8), request(3, 8, 8)
    assert it.admit(first, [])
    # Three of six pages are left, all of which the second would take.
    assert not it.admit(second, [first])
    assert second.slot == -1 and len(it.allocator.held) == 1
    assert it.admit(third, [first]) and third.slot == 1


def test_who_has_all_of_its_pages_needs_none_kept_free():
    it, first, second = room(), request(1, 12, 1), request(2, 12, 8)
    assert it.admit(first, []) and it.admit(second, [first])


def test_pages_of_idle_prefixes_are_as_good_as_free_ones():
    it, gone, first, second = room(), request(1, 12, 1), request(2, 12, 8), request(3, 8, 8)
    read(it, gone)
    it.release(gone)
    assert it.admit(first, [])
    assert it.allocator.pools[0].free == 0 and len(it.allocator.prefixes.idle) == 3
    assert it.admit(second, [first])


def test_where_nothing_runs_waiting_would_not_help():
    it = room()
    it.allocator.admit([0] * 24)
    with pytest.raises(OutOfPages):
        it.admit(request(1, 12, 1), [])


def test_a_request_takes_no_page_that_it_can_not_fill():
    it, one = room(), request(1, 11, 2)
    read(it, one)
    # One more token is stored, whatever the call has room for.
    assert it.grow([one], 5) == 5 and held(it, one) == 3


def test_a_call_takes_the_steps_that_there_is_room_for():
    it, one = room(pages=4), request(1, 4, 30)
    it.allocator.admit([0] * 8)
    read(it, one)
    assert it.grow([one], 8) == 4 and held(it, one) == 2


def test_prompts_are_published_and_answers_are_not():
    it, one = room(), request(1, 8, 9)
    read(it, one)
    assert len(it.allocator.prefixes.nodes) == 2
    it.grow([one], 5)
    it.flush()
    one.output += [1] * 5
    it.settle([one], NOTHING, reading=False)
    assert held(it, one) == 3 and len(it.allocator.prefixes.nodes) == 2


def test_who_comes_back_has_read_its_prompt():
    it, one = room(), request(1, 8, 9)
    read(it, one)
    one.suspended = Suspended(it.allocator.held[one.slot], None, None)
    it.release(one)
    one.read = 0
    assert it.admit(one, []) and one.read == 8 and held(it, one) == 2


def test_pages_that_a_policy_has_emptied_go_back_once_the_prompt_is_read():
    cache = init_cache(hybrid("*-"), 1, 32, KVCache(page_size=PAGE), EVICTING)
    cache = replace(cache, groups=(replace(cache.groups[0], length=jnp.array([5], jnp.int32)),))
    it = SharedPages(Sizes(1, PAGE, (Group("evicts", 6, 6, evicts=True),)))
    one = request(1, 14, 3)
    assert it.admit(one, [])
    it.flush()
    one.read = 8
    it.settle([one], cache, reading=True)
    assert held(it, one) == 3
    one.read, one.output = 14, [1]
    it.settle([one], cache, reading=True)
    assert held(it, one) == 1 and it.allocator.held[one.slot].stored == (5,)


def sizes(pattern: str, dtype: str = "compute", policy: Policy | None = None, chunk: int = 8, **kv) -> Sizes:
    """What the allocator of an engine would be told."""
    cfg = hybrid(pattern)
    config = EngineConfig(
        2, 32, KVCache(dtype, PAGE, pool_tokens=40, **kv), chunk=chunk, policy=policy or Policy()
    )
    pool = pool_sizes(cfg, config)
    assert pool is not None
    return book_sizes(
        config,
        init_cache(cfg, 2, 32, config.kv, config.policy, pool.pages, pool.stored),
        pool,
    )


def test_where_prefixes_may_end():
    plain, rounded, stateful = sizes("*-"), sizes("*-", "int4"), sizes("M*-", snapshots=3)
    assert plain.grid is None and plain.shares
    # Integers depend on where chunks end; without states every page may have its snapshot.
    assert (rounded.grid, rounded.snapshots) == (8, 10) and rounded.shares
    assert (stateful.grid, stateful.snapshots) == (8, 3) and stateful.shares


@pytest.mark.parametrize("pattern", ["*-", "M*-"])
def test_prefixes_can_be_refused(pattern):
    assert not sizes(pattern, prefixes=False).shares


def test_a_policy_that_evicts_needs_no_snapshots_and_any_chunk_will_do():
    # One keeps something per slot, the other nothing.
    for policy in (EVICTING, StreamingLLM(sinks=1, recent=8, buffer=4)):
        found = sizes("M*-", policy=policy, chunk=6)
        assert not found.shares and found.snapshots == 0


def test_what_evicts_has_no_pages_that_no_request_could_fill():
    # Of 32 tokens a slot stores 16 here, so that two slots fill 8 of 10 pages.
    config = EngineConfig(2, 32, KVCache(page_size=PAGE, pool_tokens=40), policy=EVICTING, stored=(16,))
    found = pool_sizes(hybrid("*-"), config)
    assert found is not None and found.pages == (8,) and found.stored == (16,)
    config = replace(config, policy=Policy())
    found = pool_sizes(hybrid("*-"), config)
    assert found is not None and found.pages == (10,)
