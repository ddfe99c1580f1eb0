"""Configurations: errors name the field, JSON gives them back, parameters are what they say."""

import json
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxllm import axes
from jaxllm.config import (
    AttentionConfig,
    ConfigError,
    GatedDeltaConfig,
    JetConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    Precision,
    RopeConfig,
)
from jaxllm.model.functional import (
    abstract_params,
    active_sizes,
    flatten,
    init_params,
    merge,
    param_axes,
    split,
)

MAMBA = MambaConfig(num_heads=8, head_dim=4, state_size=8, n_groups=2, chunk_size=8)
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=12, window=4)
MOE = MoEConfig(num_experts=12, top_k=3, intermediate_size=20, n_groups=4, topk_groups=2)
DELTA = GatedDeltaConfig(num_heads=2, num_value_heads=4, key_head_dim=6, value_head_dim=4)
JET = JetConfig(num_heads=2, key_head_dim=6, value_head_dim=8)
BASE = ModelConfig(64, 32, "M*-W", MAMBA, ATTENTION, MLPConfig(48))
CONFIGS = {
    "plain": BASE,
    "everything": BASE.replace(
        mamba=replace(MAMBA, proj_bias=True, norm_groups=1, dt_limit=(0.001, math.inf)),
        attention=replace(
            ATTENTION, rope=RopeConfig(5e5, "llama3", 8.0), qk_norm=True, qkv_bias=True, out_bias=True
        ),
        mlp=MLPConfig(48, "swiglu", bias=True),
        tie_embeddings=True,
        precision=Precision(param="bfloat16", compute="bfloat16"),
    ),
    "experts": BASE.replace(pattern="ME", moe=replace(MOE, shared_intermediate_size=40, latent_size=16)),
    "gated experts": BASE.replace(
        pattern="*E",
        moe=MoEConfig(8, 2, 20, activation="swiglu", router="softmax", correction_bias=False),
        precision=Precision(param="bfloat16"),
    ),
    "delta rule": BASE.replace(pattern="GJ-", delta=DELTA, jet=JET, precision=Precision(param="bfloat16")),
    "no conv bias": BASE.replace(mamba=replace(MAMBA, conv_bias=False), pattern="M"),
}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: BASE.replace(pattern="MX*Q"),
            r"pattern='MX\*Q': unknown letter Q, X; known letters are M \(Mamba-2\)",
        ),
        (lambda: BASE.replace(pattern=""), "pattern=''"),
        (lambda: BASE.replace(mamba=None), "mamba=None: the pattern"),
        (lambda: BASE.replace(attention=None), "attention=None: the pattern"),
        (lambda: BASE.replace(mlp=None), "mlp=None: the pattern"),
        (
            lambda: BASE.replace(attention=replace(ATTENTION, window=None)),
            "attention.window=None: the letter W",
        ),
        (
            lambda: replace(ATTENTION, num_kv_heads=3),
            "attention.num_kv_heads=3: must divide attention.num_heads=4",
        ),
        (lambda: replace(ATTENTION, window=0), "attention.window=0"),
        (lambda: replace(ATTENTION, head_dim=7, rope=RopeConfig()), "attention.head_dim=7: must be even"),
        (lambda: replace(MAMBA, n_groups=3), "mamba.n_groups=3: must divide mamba.num_heads=8"),
        (lambda: replace(MAMBA, norm_groups=5), "mamba.norm_groups=5: must divide"),
        (lambda: replace(MAMBA, conv_kernel=1), "mamba.conv_kernel=1"),
        (lambda: replace(MAMBA, dt_limit=(0.2, 0.1)), "mamba.dt_limit"),
        (lambda: replace(MAMBA, state_size=0), "mamba.state_size=0"),
        (lambda: BASE.replace(pattern="ME"), "moe=None: the pattern"),
        (lambda: replace(MOE, top_k=13), "moe.top_k=13: must be at most moe.num_experts=12"),
        (lambda: replace(MOE, n_groups=5), "moe.n_groups=5: must divide moe.num_experts=12"),
        (lambda: replace(MOE, n_groups=12, topk_groups=12), "moe.n_groups=12: .* at least 2"),
        (lambda: replace(MOE, topk_groups=5), "moe.topk_groups=5: must be at most moe.n_groups=4"),
        (lambda: replace(MOE, top_k=7), "moe.topk_groups=2: groups of 3 experts hold fewer"),
        (lambda: replace(MOE, intermediate_size=0), "moe.intermediate_size=0"),
        (lambda: replace(MOE, shared_intermediate_size=-4), "moe.shared_intermediate_size=-4"),
        (lambda: replace(MOE, scaling=0.0), "moe.scaling=0.0"),
        (
            lambda: BASE.replace(moe=replace(MOE, latent_size=33)),
            "moe.latent_size=33: must be at most hidden_size=32",
        ),
        (lambda: BASE.replace(pattern="G"), "delta=None: the pattern 'G' needs it"),
        (lambda: BASE.replace(pattern="J"), "jet=None: the pattern 'J' needs it"),
        (lambda: replace(DELTA, num_value_heads=3), "delta.num_value_heads=3: must be a multiple"),
        (lambda: replace(DELTA, conv_kernel=1), "delta.conv_kernel=1"),
        (lambda: replace(DELTA, norm_eps=0.0), "delta.norm_eps=0.0"),
        (lambda: replace(JET, key_head_dim=0), "jet.key_head_dim=0"),
        (lambda: replace(JET, generator_reduction=17), "jet.generator_reduction=17: must be at most"),
        (lambda: replace(JET, conv_kernel=1), "jet.conv_kernel=1"),
        (lambda: replace(JET, norm_eps=-1.0), "jet.norm_eps=-1.0"),
        (lambda: BASE.replace(hidden_size=0), "hidden_size=0"),
        (lambda: BASE.replace(norm_eps=0.0), "norm_eps=0.0"),
        (lambda: ModelConfig.from_dict({**BASE.to_dict(), "depth": 3}), "depth='unknown field'"),
        (
            lambda: ModelConfig.from_dict({**BASE.to_dict(), "mamba": {"head_dim": 4}}),
            "mamba.num_heads='missing'",
        ),
    ],
)
def test_errors_name_the_field(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_unknown_choices() -> None:
    """The suite's type checker sees them first, a user's program gets the ConfigError."""
    for build, given in (
        (lambda v: MLPConfig(48, v), "gelu"),
        (lambda v: RopeConfig(scaling=v), "yarn"),
        (lambda v: replace(MOE, router=v), "argmax"),
        (lambda v: replace(MOE, activation=v), "geglu"),
    ):
        with pytest.raises((ConfigError, jaxtyping.TypeCheckError), match=given):
            build(given)


@pytest.mark.parametrize("name", CONFIGS)
def test_json_gives_the_configuration_back(name: str) -> None:
    cfg = CONFIGS[name]
    text = cfg.to_json()
    assert ModelConfig.from_json(text) == cfg
    # Strict JSON has no infinities.
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} in JSON"))


@pytest.mark.parametrize("name", CONFIGS)
def test_abstract_axes_and_real_parameters_agree(name: str) -> None:
    cfg = CONFIGS[name]
    params = init_params(cfg, seed=3)
    real = {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(params).items()}
    abstract = {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(abstract_params(cfg)).items()}
    named = {path: axes.shape(parts) for path, parts in param_axes(cfg).items()}
    assert abstract == real
    assert named == {path: shape for path, (shape, _) in real.items()}
    assert ("lm_head.weight" in real) is not cfg.tie_embeddings
    for path, (_, dtype) in real.items():
        kept = path.endswith(("A_log", ".D", "dt_bias", "e_score_correction_bias"))
        assert dtype == (jnp.float32 if kept else jnp.dtype(cfg.precision.param)), path
    again = split(merge(cfg, params))
    assert again[0] == cfg
    assert jax.tree.structure(again[1]) == jax.tree.structure(params)


def test_fused_projection_segments() -> None:
    """z | x | B | C | dt, as it is stored and sharded and pruned."""
    axis = param_axes(BASE)["layers.0.mixer.in_proj.weight"][1]
    assert isinstance(axis, axes.Concat)
    assert [(n, s.stop - s.start) for n, s in axis.slices()] == [("z", 32), ("xBC", 64), ("dt", 8)]
    inner = axis.parts[1]
    assert isinstance(inner, axes.Concat)
    assert [(n, s.stop - s.start) for n, s in inner.slices()] == [("x", 32), ("B", 16), ("C", 16)]


def test_no_shared_expert_has_two_spellings() -> None:
    assert replace(MOE, shared_intermediate_size=0) == replace(MOE, shared_intermediate_size=None)


def test_active_sizes() -> None:
    """Of stacked experts top_k count, of the router and everything else all."""
    cfg = CONFIGS["experts"]
    whole = {path: math.prod(leaf.shape) for path, leaf in flatten(abstract_params(cfg)).items()}
    active = active_sizes(cfg)
    assert {path for path in whole if active[path] != whole[path]} == {
        "layers.1.mixer.experts.up_proj",
        "layers.1.mixer.experts.down_proj",
    }
    assert active["layers.1.mixer.experts.up_proj"] == 3 * 16 * 20
    assert whole["layers.1.mixer.experts.up_proj"] == 12 * 16 * 20


def test_initial_statistics() -> None:
    """dt in [1e-3, 0.1], A in [1, 16], linear weights of init_std, residual ones divided by sqrt(layers)."""
    cfg = ModelConfig(
        512,
        128,
        "M*-" * 3,
        MambaConfig(num_heads=64, head_dim=8, state_size=16),
        AttentionConfig(8, 4, 16),
        MLPConfig(256),
    )
    params = {path: np.asarray(leaf) for path, leaf in flatten(init_params(cfg, seed=1)).items()}
    dt = np.log1p(np.exp(params["layers.0.mixer.dt_bias"].astype(np.float64)))
    assert 1e-3 * 0.999 <= dt.min() < 5e-3 < 2e-2 < dt.max() <= 0.1001
    decay = np.exp(params["layers.0.mixer.A_log"])
    assert 1 <= decay.min() < 4 < 12 < decay.max() <= 16
    assert np.all(params["layers.0.mixer.D"] == 1)
    for path in (
        "embed",
        "lm_head",
        "layers.0.mixer.in_proj",
        "layers.1.mixer.q_proj",
        "layers.2.mixer.up_proj",
    ):
        assert params[f"{path}.weight"].std() == pytest.approx(0.02, rel=0.05), path
    for path in ("layers.0.mixer.out_proj", "layers.1.mixer.o_proj", "layers.2.mixer.down_proj"):
        assert params[f"{path}.weight"].std() == pytest.approx(0.02 / 3, rel=0.05), path
    conv = params["layers.0.mixer.conv_weight"]
    assert np.abs(conv).max() <= 0.5
    assert conv.std() == pytest.approx(1 / 12**0.5, rel=0.05)
    assert np.all(params["layers.0.norm.weight"] == 1)
    # Every layer has weights of its own, and another seed gives others.
    assert not np.array_equal(
        params["layers.0.mixer.in_proj.weight"], params["layers.3.mixer.in_proj.weight"]
    )
    assert not np.array_equal(params["embed.weight"], np.asarray(init_params(cfg, seed=2)["embed"]["weight"]))


def test_initial_statistics_of_the_delta_rule() -> None:
    """As for Mamba-2, with A in (0, 16]; a JetBlock starts with a static convolution, whose generator can learn."""
    cfg = ModelConfig(
        64, 128, "GJ", delta=GatedDeltaConfig(64, None, 4, 8), jet=JetConfig(64, 4, 16, generator_reduction=4)
    )
    params = {path: np.asarray(leaf) for path, leaf in flatten(init_params(cfg, seed=1)).items()}
    for layer in (0, 1):
        dt = np.log1p(np.exp(params[f"layers.{layer}.mixer.dt_bias"].astype(np.float64)))
        assert 1e-3 * 0.999 <= dt.min() < 5e-3 < 2e-2 < dt.max() <= 0.1001
        decay = np.exp(params[f"layers.{layer}.mixer.A_log"])
        assert 0 < decay.min() < 2 < 12 < decay.max() <= 16
    assert np.abs(params["layers.0.mixer.conv_weight"]).max() <= 0.5
    for path in ("0.mixer.in_proj.weight", "1.mixer.v_proj.weight", "1.mixer.generator.w1.weight"):
        assert params[f"layers.{path}"].std() == pytest.approx(0.02, rel=0.05), path
    for path in ("0.mixer.out_proj.weight", "1.mixer.o_proj.weight"):
        assert params[f"layers.{path}"].std() == pytest.approx(0.02 / 2**0.5, rel=0.05), path
    assert not params["layers.1.mixer.generator.w2.weight"].any()
    assert params["layers.1.mixer.generator.w2.bias"].std() == pytest.approx(0.02, rel=0.05)


def test_delta_projection_segments() -> None:
    """q | k | v | z and beta | decay, heads outermost."""
    named = param_axes(CONFIGS["delta rule"])
    axis, gates = named["layers.0.mixer.in_proj.weight"][1], named["layers.0.mixer.gate_proj.weight"][1]
    assert isinstance(axis, axes.Concat) and isinstance(gates, axes.Concat)
    assert [(n, s.stop - s.start) for n, s in axis.slices()] == [("qkv", 40), ("z", 16)]
    assert [(n, s.stop - s.start) for n, s in gates.slices()] == [("beta", 4), ("decay", 4)]
    taps = named["layers.1.mixer.generator.w2.weight"][1]
    assert isinstance(taps, axes.Product) and [part.size for part in taps.parts] == [4, 16]
