"""Tiny Hugging Face configurations and seeded weights that leave no tensor at its default."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB, EPS = 101, 3e-3

HYBRID = {
    "model_type": "nemotron_h",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "layer_norm_epsilon": EPS,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "ssm_state_size": 16,
    "chunk_size": 8,
    # Not hidden * expand = heads * head_dim: nothing may read it.
    "expand": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "intermediate_size": 72,
}
_MAMBA2 = {
    "model_type": "mamba2",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 12,
    "state_size": 16,
    "expand": 2,
    "chunk_size": 8,
    "layer_norm_epsilon": EPS,
}
TRANSFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "intermediate_size": 72,
    "rms_norm_eps": EPS,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
# Wavelengths of head_dim 20 at theta 10000 are 6, 16, 39, 99, ...: kept, blended and divided ones all occur.
_MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 28,
    "moe_shared_expert_intermediate_size": 36,
    "routed_scaling_factor": 1.6,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}

CASES: dict[str, dict[str, Any]] = {
    "nemotron_h": HYBRID | {"hybrid_override_pattern": "M*-M", "n_groups": 2},
    "nemotron_h_one_group": HYBRID
    | {
        "hybrid_override_pattern": "M*-",
        "n_groups": 1,
        "use_conv_bias": False,
        "use_bias": True,
        "mlp_bias": True,
    },
    "nemotron_h_group_per_head": HYBRID | {"hybrid_override_pattern": "*-M", "n_groups": 8},
    "nemotron_moe": HYBRID | _MOE | {"hybrid_override_pattern": "ME*E", "n_groups": 2},
    "nemotron_latent": HYBRID
    | _MOE
    | {
        "hybrid_override_pattern": "*EM-E",
        "n_groups": 2,
        "moe_latent_size": 20,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
    },
    "mixtral": TRANSFORMER | {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2},
    "mixtral_window": TRANSFORMER
    | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 7},
    "qwen3_moe": TRANSFORMER
    | {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 28,
        "norm_topk_prob": True,
    },
    "qwen3_moe_mixed": TRANSFORMER
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 28,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 9,
    },
    "mamba2": _MAMBA2 | {"n_groups": 2, "tie_word_embeddings": True},
    "mamba2_one_group": _MAMBA2 | {"n_groups": 1, "use_bias": True, "tie_word_embeddings": False},
    "llama": TRANSFORMER | {"model_type": "llama"},
    "llama3": TRANSFORMER | {"model_type": "llama", "rope_scaling": _LLAMA3, "tie_word_embeddings": True},
    "llama_bias": TRANSFORMER
    | {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "num_key_value_heads": 1,
    },
    "qwen2": TRANSFORMER | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": TRANSFORMER | {"model_type": "qwen2", **_SLIDING},
    "qwen3": TRANSFORMER | {"model_type": "qwen3"},
    "qwen3_window": TRANSFORMER
    | {
        "model_type": "qwen3",
        "attention_bias": True,
        **_SLIDING,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}

# No class of transformers: checked against its parts, in test_jet.py.
JET = {
    "model_type": "jet_nemotron",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "layer_types": ["jet", "swa", "attn", "jet"],
    "efficient_attention_config": {
        # 8 / 3 as released: a decimal cut off, and a number that is a string.
        "jet": {
            "mode": "chunk",
            "num_heads": 3,
            "head_dim": 6,
            "expand_v": 2.6666666667,
            "norm_eps": "3e-3",
            "conv_size": 4,
            "dconv_generator_reduction": 6,
            "dconv_implementation": "triton",
        },
        "swa": {"window_size": 7},
    },
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "intermediate_size": 72,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 128,
    "max_window_layers": 4,
    "use_mrope": False,
    "tie_word_embeddings": True,
}

# Recorded in fixtures/ and checked without torch; the others are compared with a live model only.
RECORDED = (
    "nemotron_h",
    "nemotron_latent",
    "mixtral",
    "qwen3_moe",
    "mamba2",
    "llama3",
    "qwen2_window",
    "qwen3_window",
)


def weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 value of a tensor by its disk name: large enough that every one of them moves the logits."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = rng.standard_normal(shape)
    leaf = name.rsplit(".", 2)
    if name.endswith("A_log"):
        value = 0.5 + 0.7 * normal
    elif name.endswith("dt_bias"):
        value = -2.5 + 1.2 * normal
    elif name.endswith(".D"):
        value = 1 + 0.5 * normal
    elif "conv1d.weight" in name:
        value = 0.6 * normal
    elif name.endswith("bias"):
        value = 0.4 * normal
    elif "norm" in leaf[-2]:
        value = 1 + 0.3 * normal
    elif "embed" in leaf[-2]:
        value = normal * 0.3
    elif name == "lm_head.weight":
        value = 1.5 * normal / shape[-1] ** 0.5
    else:
        value = 1.4 * normal / shape[-1] ** 0.5
    return value.astype(np.float32)


def prompt(seed: int, rows: int = 2, length: int = 29) -> np.ndarray:
    """i64[rows, length]; the length is no multiple of the chunk, and more than three of them."""
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def write_folder(folder: Path, config: dict[str, Any], shapes: dict[str, Any], seed: int) -> Path:
    """A Hugging Face folder with :func:`weight` in every tensor of ``shapes``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: weight(name, tuple(shape), seed) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
