"""Repeated groups under lax.scan compute what the layers one by one compute."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxllm import LanguageModel, hf
from jaxllm.batch import PackedBatch
from jaxllm.cache.state import init_cache
from jaxllm.config import ConfigError, MoEConfig
from jaxllm.model.functional import (
    active_sizes,
    flatten,
    init_params,
    map_named,
    merge,
    param_axes,
    stack,
    unstack,
)
from jaxllm.model.scan import groups_of
from jaxllm.presets import preset
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.flops import forward_flops_per_token
from jaxllm.train.optim import decays
from jaxllm.train.settings import TrainSettings
from jaxllm.train.trainer import fit
from tests.train.tiny import TinyLoader, constant_lr, tiny_batch, tiny_config

# Experts in a group that is not repeated and in one that is.
PATTERN = "ME*E*E"
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=12)


@given(st.text("M*-", min_size=1, max_size=20))
@example("M" * 24)
def test_groups_give_the_pattern_back_and_trace_no_more(pattern: str) -> None:
    groups = groups_of(pattern)
    rebuilt = "".join(pattern[g.start : g.start + g.length] * g.repeats for g in groups)
    assert rebuilt == pattern and [g.start for g in groups] == list(
        np.cumsum([0] + [g.length * g.repeats for g in groups[:-1]])
    )
    assert sum(g.length for g in groups) <= len(pattern)


def test_a_motif_is_not_torn_by_the_repeats_inside_it() -> None:
    """Its stages would have other letters each, and four loops take longer to compile than five letters."""
    assert groups_of("MMMM-" * 2) == ((0, 5, 2),)
    assert groups_of("MMMM-" * 4) == ((0, 5, 4),)


@pytest.mark.parametrize(
    ("pattern", "traced"),
    [(preset("nemotron-h-8b").pattern, 13), ("*-" * 32, 2), ("M" * 24, 1), ("M-*" + "M-" * 9, 5), ("M*-", 3)],
)
def test_deep_patterns_trace_few_letters(pattern: str, traced: int) -> None:
    assert sum(group.length for group in groups_of(pattern)) == traced


@functools.cache
def models() -> Any:
    """(stacked config, parameters, plain config, the same parameters one by one)."""
    cfg = tiny_config(PATTERN, scan_layers=True, moe=MOE)
    rng = np.random.default_rng(0)
    params = map_named(lambda _, v: v + 0.2 * rng.standard_normal(v.shape).astype(v.dtype), init_params(cfg))
    return cfg, params, *unstack(cfg, params)


@pytest.mark.parametrize("remat", ["none", "layer", "dots"])
def test_same_numbers(remat: str) -> None:
    cfg, params, plain, single = models()
    batch = jax.tree.map(jnp.asarray, tiny_batch(2, 12))
    weights = np.random.default_rng(1).standard_normal((2, 12, cfg.vocab_size)).astype(np.float32)
    weights *= (batch.segment_ids > 0)[..., None]

    def run(cfg: Any, params: Any) -> Any:
        def loss(params: Any) -> Any:
            model = merge(cfg, params)
            h, aux = model.hidden(
                batch, model.context(remat=remat, taps=frozenset({"hidden", "expert_counts"}))
            )
            return jnp.sum(model.head(h) * weights), aux

        options = {"xla_backend_optimization_level": 0}
        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)(params)

    (value, taps), gradient = run(cfg, params)
    (expected, plain_taps), grads = run(plain, single)
    assert taps["expert_counts"].shape == (3, 4)
    np.testing.assert_array_equal(taps["expert_counts"], plain_taps["expert_counts"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(taps["hidden"], plain_taps["hidden"], atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * float(np.abs(b).max() + 1)),
        unstack(cfg, gradient)[1],
        grads,
    )


def test_there_and_back() -> None:
    cfg, params, plain, single = models()
    jax.tree.map(np.testing.assert_array_equal, stack(cfg, single), params)
    assert flatten(single).keys() == flatten(init_params(plain)).keys()
    axes, plain_axes = param_axes(cfg), param_axes(plain)
    stacked = "groups.1.blocks.1.mixer.gate.weight"
    assert [axis.name for axis in axes[stacked]] == ["layers", "embed", "experts"]
    assert axes[stacked][1:] == plain_axes["layers.5.mixer.gate.weight"]
    assert forward_flops_per_token(cfg, 64) == forward_flops_per_token(plain, 64)
    assert sum(active_sizes(cfg).values()) == sum(active_sizes(plain).values())
    # Which parameters decay does not depend on how they are held.
    for name in axes:
        layer = name if not name.startswith("groups.") else "layers.0." + name.split(".", 4)[4]
        assert decays(name) == decays(layer), name


def test_training_leaves_an_ordinary_model(tmp_path: Any) -> None:
    cfg, _, plain, single = models()
    optim, settings = constant_lr(1e-3), TrainSettings(steps=3)
    result = fit(cfg, optim, TinyLoader(), settings, folder=tmp_path, params=single)
    expected = fit(plain, optim, TinyLoader(), settings, params=single)
    assert result.cfg == plain and result.loss == pytest.approx(expected.loss, rel=1e-4)
    saved = Checkpoints(tmp_path / "checkpoints").load_params()
    assert saved[0].to_dict() == plain.to_dict()
    jax.tree.map(np.testing.assert_array_equal, saved[1], result.params)
    # It goes on stacked, and in no other form.
    assert fit(cfg, optim, TinyLoader(), settings, folder=tmp_path).step == 3
    with pytest.raises(ConfigError, match="scan_layers"):
        fit(plain, optim, TinyLoader(), TrainSettings(steps=5), folder=tmp_path)


def test_what_needs_single_layers_says_so(tmp_path: Any) -> None:
    cfg, params, plain, _ = models()
    model, batch = merge(cfg, params), PackedBatch.from_rows([[1, 2]])
    with pytest.raises(ConfigError, match=r"scan_layers=True: is for training; use functional\.unstack"):
        model.extend(batch, init_cache(plain, 1, 4))
    with pytest.raises(ConfigError, match=r"use functional\.unstack first"):
        hf.save(LanguageModel(cfg, params), tmp_path)
