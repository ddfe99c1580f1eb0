"""config.json: every spelling, and everything that must be refused."""

import json
import math
from typing import Any

import pytest
from hf_cases import CASES

import jaxllm.hf as hf
from jaxllm.config import ConfigError, RopeConfig
from jaxllm.presets import PRESETS, preset

NEMOTRON = CASES["nemotron_h"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip(name: str) -> None:
    """Through JSON text, in the family that is chosen for them."""
    cfg = preset(name)
    text = json.dumps(hf.config_to_hf(cfg, hf.choose_family(cfg)), allow_nan=False)
    assert hf.config_from_hf(json.loads(text)) == cfg


@pytest.mark.parametrize("case", CASES)
def test_cases_survive_the_round_trip(case: str) -> None:
    cfg = hf.config_from_hf(CASES[case])
    again = hf.config_to_hf(cfg, CASES[case]["model_type"])
    assert hf.config_from_hf(again) == cfg


@pytest.mark.parametrize("limit", [None, [0.0, math.inf], [0.0, 1e308], [0.0, {"__float__": "Infinity"}]])
def test_four_spellings_of_no_clamp(limit: Any) -> None:
    data = NEMOTRON | ({} if limit is None else {"time_step_limit": limit})
    assert hf.config_from_hf(data).mamba.dt_limit == (0.0, math.inf)


def test_dt_limit_is_honoured_and_time_step_min_is_not() -> None:
    data = NEMOTRON | {"time_step_limit": [0.01, 0.5], "time_step_min": 0.001}
    cfg = hf.config_from_hf(data)
    assert cfg.mamba.dt_limit == (0.01, 0.5)
    with pytest.warns(UserWarning, match="ignores the upper limit"):
        written = hf.config_to_hf(cfg, "nemotron_h")
    assert written["time_step_min"] == 0.01


def test_old_and_new_names_of_nemotron_h() -> None:
    renamed = dict(NEMOTRON)
    for new, old in {
        "n_groups": "mamba_n_groups",
        "chunk_size": "mamba_chunk_size",
        "expand": "mamba_expand",
        "layer_norm_epsilon": "rms_norm_eps",
        "head_dim": "attention_head_dim",
    }.items():
        renamed[old] = renamed.pop(new)
    renamed |= {
        "mamba_d_conv": 4,
        "mamba_conv_bias": True,
        "mamba_dt_min": 0.001,
        "mamba_dt_limit": [0.0, 1e308],
    }
    renamed["layers_block_type"] = ["mamba", "attention", "mlp", "linear_attention"]
    del renamed["hybrid_override_pattern"]
    assert hf.config_from_hf(renamed) == hf.config_from_hf(NEMOTRON)


def test_disagreeing_layer_count_warns() -> None:
    with pytest.warns(UserWarning, match="num_hidden_layers=9"):
        cfg = hf.config_from_hf(NEMOTRON | {"num_hidden_layers": 9})
    assert cfg.pattern == "M*-M"


def test_rope_in_both_forms() -> None:
    scaling = CASES["llama3"]["rope_scaling"]
    new = {k: v for k, v in CASES["llama3"].items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**scaling, "rope_theta": 10000.0}
    expected = RopeConfig(10000.0, "llama3", 4.0, 1.0, 4.0, 64)
    for data in (new, CASES["llama3"]):
        assert hf.config_from_hf(data).attention.rope == expected


def test_qwen_windows() -> None:
    base = CASES["qwen2_window"]
    assert hf.config_from_hf(base).pattern == "*-W-"
    assert hf.config_from_hf(base | {"use_sliding_window": False}).pattern == "*-*-"
    assert hf.config_from_hf(base | {"sliding_window": None}).pattern == "*-*-"
    assert (
        hf.config_from_hf(base | {"layer_types": ["sliding_attention", "full_attention"]}).pattern == "W-*-"
    )


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("nemotron_h", {"hybrid_override_pattern": "ME*-"}, "moe_shared_expert_intermediate_size: missing"),
        ("nemotron_moe", {"n_routed_experts": None}, "n_routed_experts: missing"),
        ("nemotron_moe", {"mlp_bias": True}, "mlp_bias=True: unsupported, experts have no biases"),
        ("nemotron_moe", {"moe_shared_expert_intermediate_size": 0}, "moe_shared_expert_intermediate_size=0"),
        ("nemotron_latent", {"n_group": 3}, "moe.n_groups=3"),
        ("mixtral", {"num_experts_per_tok": 9}, "moe.top_k=9"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size: missing"),
        ("nemotron_h", {"hybrid_override_pattern": "MX"}, "unknown letter X"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu'"),
        ("nemotron_h", {"mamba_hidden_act": "gelu"}, "mamba_hidden_act"),
        ("nemotron_h", {"attention_bias": True}, "attention_bias=True"),
        ("nemotron_h", {"sliding_window": 64}, "sliding_window=64"),
        ("nemotron_h", {"num_nextn_predict_layers": 1}, "mtp_hybrid_override_pattern"),
        ("nemotron_h", {"time_step_limit": [0.1]}, "time_step_limit"),
        ("nemotron_h", {"vocab_size": None}, "vocab_size: missing"),
        ("mamba2", {"expand": 3}, "expand=3"),
        ("mamba2", {"hidden_act": "relu"}, "hidden_act"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"sliding_window": 64}, "sliding_window"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ("qwen3", {"logit_softcap": 30.0, "mystery": 1}, "logit_softcap=30.0, mystery=1"),
        ("llama", {"model_type": "gpt2"}, "model_type='gpt2'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config.*float16 only. Give the folder"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'.*bfloat16"),
    ],
)
def test_refusals_name_the_field(case: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf.config_from_hf(CASES[case] | change)


def test_models_that_no_family_expresses() -> None:
    cfg = preset("quickstart")
    rotary = cfg.replace(attention=preset("llama_3_1_8b").attention)
    with pytest.raises(ConfigError, match=r"no Hugging Face family.*(\n.*)*attention.rope"):
        hf.choose_family(rotary)
    with pytest.raises(ConfigError, match="llama cannot express this model: pattern"):
        hf.config_to_hf(cfg, "llama")
    with pytest.raises(ConfigError, match="family='gpt2'"):
        hf.config_to_hf(cfg, "gpt2")


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'nemotron_h_8b'.*quickstart"):
        preset("nemotron-h-8bb")
    assert preset("llama-3.2-1b") == preset("llama_3_2_1b")
