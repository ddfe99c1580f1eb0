"""The compiled decode step over pages: pools change where they lie, also where a policy evicts under a condition."""

import functools
import re

import jax
import pytest

from jaxllm.cache.kv import KVCache
from jaxllm.cache.paged import PagedState
from jaxllm.cache.state import init_cache
from jaxllm.generation import steps
from jaxllm.generation.sampling import Features, init_sampling
from tests.generation.conftest import hybrid, parameters
from tests.generation.test_policies import PAGE, SMALL

# Pools far larger than all that a step needs for the 64 tokens that it may read.
SLOTS, CAPACITY, BOUND = 3, 4096, 64
CASES = [(name, dtype) for name in SMALL if name != "mixed" for dtype in ("float32", "bfloat16", "int4")]
COPIES = {"copy", "convert", "transpose", "concatenate", "select"}
# What only names an array.
GIVEN = {"parameter", "get-tuple-element"}
# Each compiles a program of its own; the others run with ``-m slow``.
QUICK = [("Quest", "bfloat16"), ("RKV", "int4"), ("Pillar", "bfloat16")]


@functools.cache
def compiled(name, dtype):
    """(the cache, the compiled step of three tokens)."""
    cfg = hybrid("*")
    cache = init_cache(cfg, SLOTS, CAPACITY, KVCache(dtype, PAGE), SMALL[name])
    static = dict(cfg=cfg, features=Features(), rows=SLOTS, bound=BOUND, k=3)
    step = steps._decode_jit(steps._operands(cfg, cache))
    return cache, step.lower(parameters(cfg), cache, init_sampling(SLOTS), 3, 1, **static).compile()


def whole_pools(cache, text):
    """Operations that make a second array of a pool's type and shape."""
    state = next(state for state in cache.layers if isinstance(state, PagedState))
    # Inside a fusion nothing is written but its root.
    text = re.sub(r"^%fused_computation.*?^\}", "", text, flags=re.DOTALL | re.MULTILINE)
    found = set()
    for leaf in jax.tree.leaves((state.k, state.v)):
        shape = ",".join(map(str, leaf.shape))
        results = re.findall(rf"= (\w+)\[{shape}\]\S* (\w[\w-]*)\(", text)
        assert results, "the pools must be found in the program"
        # bfloat16 lies there as its bits: its floats are a second array, whatever made them.
        found |= {op if dtype != "bf16" else f"floats by {op}" for dtype, op in results if op not in GIVEN}
    return {op for op in found if op in COPIES or op.startswith("floats")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            *case,
            marks=() if case in QUICK else (pytest.mark.slow if "int4" in case else pytest.mark.nightly,),
        )
        for case in CASES
    ],
)
def test_paged_pools_are_updated_in_place(name, dtype):
    cache, step = compiled(name, dtype)
    text = step.as_text()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliases and aliases[1].count("alias") >= len(jax.tree.leaves(cache))
    assert not whole_pools(cache, text)


@pytest.mark.parametrize(("name", "dtype"), QUICK)
def test_a_step_needs_less_room_than_a_pool(name, dtype):
    """A copy of any kind and name would need as much."""
    cache, step = compiled(name, dtype)
    state = next(state for state in cache.layers if isinstance(state, PagedState))
    assert step.memory_analysis().temp_size_in_bytes < sum(leaf.nbytes for leaf in jax.tree.leaves(state.k))


@pytest.mark.parametrize(
    ("kv", "pattern", "wanted"),
    [
        (KVCache(), "*", "float32"),
        (KVCache(page_size=PAGE), "*", "float32"),
        (KVCache("bfloat16"), "M*", "bfloat16"),
        (KVCache("bfloat16"), "W", "bfloat16"),
        (KVCache("bfloat16"), "M-", "float32"),
        (KVCache("bfloat16", PAGE), "*", "bfloat16"),
        (KVCache("int4", PAGE), "*", "bfloat16"),
    ],
)
def test_programs_know_the_narrowest_operands_of_attention(kv, pattern, wanted):
    cfg = hybrid(pattern)
    cache = jax.eval_shape(lambda: init_cache(cfg, SLOTS, 64, kv))
    assert steps._operands(cfg, cache) == wanted


def test_a_copied_pool_would_be_found():
    """The same search, in a line that such a program would have."""
    cache = init_cache(hybrid("*"), SLOTS, CAPACITY, KVCache("float32", PAGE))
    shape = ",".join(map(str, cache.layers[0].k.shape))
    line = f"%copy.1 = f32[{shape}]{{3,2,1,0}} copy(%pool)"
    assert whole_pools(cache, line) == {"copy"}
    assert whole_pools(cache, line.replace("copy(", "scatter(")) == set()
    floats = f"%wrapped = bf16[{shape}]{{3,2,1,0}} fusion(%pool), kind=kLoop"
    assert whole_pools(cache, floats) == {"floats by fusion"}
    assert whole_pools(cache, floats.replace("fusion(", "parameter(")) == set()
