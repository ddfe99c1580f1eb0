"""Schedules against optax, the decay mask by name, AdamW against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.config import AttentionConfig, ConfigError, GatedDeltaConfig, JetConfig
from jaxllm.model.functional import abstract_params, flatten
from jaxllm.train.loss import LossSums
from jaxllm.train.optim import OptimConfig, decay_mask, learning_rate
from jaxllm.train.state import TrainState, make_optimizer
from jaxllm.train.step import apply_gradients
from tests.train.tiny import tiny_config

OPTIM = OptimConfig(lr=0.3, warmup_steps=5, total_steps=45, decay_fraction=0.25, min_lr_ratio=0.1)


def test_wsd_is_optax_pieces():
    pieces = [
        optax.linear_schedule(0.3 / 5, 0.3, 4),
        optax.constant_schedule(0.3),
        optax.linear_schedule(0.3, 0.03, 10),
    ]
    expected = optax.join_schedules(pieces, [5, 35])
    for step in range(50):
        np.testing.assert_allclose(learning_rate(OPTIM, step), expected(step), rtol=1e-5)


def test_cosine_is_optax_pieces():
    optim = OptimConfig(lr=0.3, schedule="cosine", warmup_steps=5, total_steps=45, min_lr_ratio=0.1)
    pieces = [optax.linear_schedule(0.3 / 5, 0.3, 4), optax.cosine_decay_schedule(0.3, 40, alpha=0.1)]
    expected = optax.join_schedules(pieces, [5])
    for step in range(50):
        np.testing.assert_allclose(learning_rate(optim, step), expected(step), rtol=1e-5)


def test_host_and_traced_rates_agree():
    for step in (0, 3, 20, 44):
        np.testing.assert_allclose(
            learning_rate(OPTIM, step), learning_rate(OPTIM, jnp.int32(step)), rtol=1e-6
        )
    assert not isinstance(learning_rate(OPTIM, 3, 0.5), jax.Array)


def test_clock_drives_the_decay_and_steps_the_warmup():
    optim = OptimConfig(lr=0.3, warmup_steps=5, decay_fraction=0.25, min_lr_ratio=0.0)
    assert learning_rate(optim, 100, 0.5) == np.float32(0.3)
    np.testing.assert_allclose(learning_rate(optim, 100, 0.875), 0.15, rtol=1e-5)
    assert learning_rate(optim, 100, 1.0) == 0
    np.testing.assert_allclose(learning_rate(optim, 0, 0.5), 0.06, rtol=1e-5)


def test_schedule_without_a_length_says_what_to_do():
    with pytest.raises(ConfigError, match=r"optim\.total_steps=None.*schedule='constant'"):
        learning_rate(OptimConfig(), 3)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0},
        {"betas": (0.9, 1.0)},
        {"clip_norm": -1.0},
        {"total_steps": 5, "warmup_steps": 5},
        {"decay_fraction": 0.0},
    ],
)
def test_bad_settings_name_the_field(change):
    with pytest.raises(ConfigError, match=rf"optim\.{next(iter(change))}="):
        OptimConfig(**change)


def test_decay_mask_by_names():
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, qk_norm=True, qkv_bias=True)
    cfg = tiny_config("M*-", attention=attention, tie_embeddings=False)
    mask = flatten(decay_mask(abstract_params(cfg)))
    assert {name for name, decayed in mask.items() if decayed} == {
        "embed.weight",
        "lm_head.weight",
        "layers.0.mixer.in_proj.weight",
        "layers.0.mixer.out_proj.weight",
        "layers.0.mixer.conv_weight",
        *(f"layers.1.mixer.{n}_proj.weight" for n in "qkvo"),
        "layers.2.mixer.up_proj.weight",
        "layers.2.mixer.down_proj.weight",
    }
    assert {"layers.0.mixer.A_log", "layers.0.mixer.norm.weight", "layers.1.mixer.q_proj.bias"} <= set(mask)


def test_decay_mask_of_the_delta_rule():
    delta, jet = GatedDeltaConfig(2, None, 4, 4), JetConfig(2, 4, 4)
    mask = flatten(decay_mask(abstract_params(tiny_config("GJ", delta=delta, jet=jet))))
    mixers = {name.removeprefix("layers.") for name, decayed in mask.items() if decayed} - {"embed.weight"}
    assert mixers == {
        *(f"0.mixer.{n}" for n in ("in_proj.weight", "gate_proj.weight", "conv_weight", "out_proj.weight")),
        *(f"1.mixer.{n}_proj.weight" for n in "qkvbago"),
        *(f"1.mixer.generator.{n}.weight" for n in ("w1", "w2")),
    }


def state_of_params(params, optim):
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, make_optimizer(optim).init(params), zero, jnp.zeros(2, jnp.uint32), zero, zero)


def sums(weight=1.0, nats=1.0):
    return LossSums(jnp.float32(nats), jnp.float32(weight), jnp.float32(0), jnp.float32(0), jnp.float32(0))


def test_clipping_is_optax_and_reports_the_norm_before():
    optim = OptimConfig(schedule="constant", warmup_steps=0, clip_norm=0.5, weight_decay=0.0)
    params = {"a": {"weight": jnp.ones((3, 2))}}
    grads = jax.tree.map(lambda p: 3 * p, params)
    state, metrics = apply_gradients(optim, state_of_params(params, optim), grads, sums(weight=2.0), 0.1)
    mean = jax.tree.map(lambda g: g / 2, grads)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(mean), rtol=1e-6)
    clipped, _ = optax.clip_by_global_norm(0.5).update(mean, optax.EmptyState())
    tx = optax.adamw(0.1, 0.9, 0.95, weight_decay=0.0)
    updates, _ = tx.update(clipped, tx.init(params), params)
    np.testing.assert_allclose(
        state.params["a"]["weight"], (params["a"]["weight"] + updates["a"]["weight"]), rtol=1e-5
    )
    np.testing.assert_allclose(state.opt_state.mu["a"]["weight"], 0.1 * clipped["a"]["weight"], rtol=1e-5)


@pytest.mark.oracle
def test_adamw_is_pytorchs():
    import torch

    optim = OptimConfig(lr=0.02, schedule="constant", warmup_steps=0, clip_norm=None, weight_decay=0.3)
    rng = np.random.default_rng(0)
    start = {"x": {"weight": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}}
    start = jax.tree.map(lambda v: v.astype(np.float32), start)
    weight, bias = (torch.nn.Parameter(torch.tensor(start["x"][n])) for n in ("weight", "bias"))
    groups = [{"params": [weight], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    state = state_of_params(jax.tree.map(jnp.asarray, start), optim)
    for _ in range(5):
        grads = jax.tree.map(lambda v: rng.normal(size=v.shape).astype(np.float32), start)
        weight.grad, bias.grad = torch.tensor(grads["x"]["weight"]), torch.tensor(grads["x"]["bias"])
        theirs.step()
        state, _ = apply_gradients(optim, state, grads, sums(), 0.02)
    np.testing.assert_allclose(state.params["x"]["weight"], weight.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.params["x"]["bias"], bias.detach().numpy(), rtol=1e-5, atol=1e-6)
