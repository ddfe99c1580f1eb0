"""The compiled decode step: updates its pools in place, and reads weights that were rounded once."""

import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.batch import PackedBatch
from jaxllm.cache.kv import KVCache
from jaxllm.cache.state import init_cache
from jaxllm.config import Precision
from jaxllm.generation import steps, weights
from jaxllm.generation.sampling import Features, init_sampling
from jaxllm.model import functional
from tests.generation.conftest import hybrid, parameters

SLOTS, CAPACITY = 4, 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pools_are_updated_in_place(dtype):
    """Donation is honoured, and the loop over steps neither copies nor converts a whole pool of keys."""
    cfg = hybrid("M*")
    cache = init_cache(cfg, SLOTS, CAPACITY, KVCache(dtype=dtype))
    static = dict(cfg=cfg, features=Features(), rows=SLOTS, bound=16, k=3)
    step = steps._decode_jit("float32")
    text = step.lower(parameters(cfg), cache, init_sampling(SLOTS), 3, 1, **static).compile().as_text()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliases and aliases[1].count("alias") >= len(jax.tree.leaves(cache))
    shape = ",".join(map(str, cache.layers[1].k.shape))
    results = re.findall(rf"= (\w+)\[{shape}\]\S* (\w[\w-]*)\(", text)
    assert {kind for kind, _ in results} == {"f32" if dtype == "float32" else "u16"}
    assert not {op for _, op in results} & {"copy", "convert"}
    assert any("scatter" in op or op == "fusion" for _, op in results), "the write itself must be found"


@pytest.mark.parametrize("rows", [1, 8])
def test_rounding_once_is_rounding_at_every_call(rows, rng):
    cfg = hybrid("M*-").replace(precision=Precision(matmul="bfloat16"))
    params = parameters(cfg)
    rounded = weights.operands(cfg, params)
    flat, names = functional.flatten(rounded), functional.linear_weights(cfg)
    assert {name for name, leaf in flat.items() if leaf.dtype == jnp.bfloat16} == names
    assert {"layers.0.mixer.in_proj.weight", "layers.2.mixer.up_proj.weight", "lm_head.weight"} <= names
    batch = PackedBatch.from_rows(rng.integers(0, cfg.vocab_size, (rows, 1)))
    forward = jax.jit(lambda p: functional.merge(cfg, p)(batch))
    np.testing.assert_array_equal(np.asarray(forward(params)), np.asarray(forward(rounded)))


def test_rounded_weights_are_made_once_and_die_with_their_origin():
    cfg = hybrid("-").replace(precision=Precision(matmul="bfloat16"))
    params = parameters(cfg)
    weights.clear()
    first, second = (functional.flatten(weights.operands(cfg, params)) for _ in range(2))
    assert all(first[name] is second[name] for name in first)
    assert len(weights._rounded) == len(functional.linear_weights(cfg))
    del params, first, second
    gc.collect()
    assert not weights._rounded


def test_nothing_is_rounded_in_full_precision():
    cfg = hybrid("-")
    params = parameters(cfg)
    assert weights.operands(cfg, params) is params
