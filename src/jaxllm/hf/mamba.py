"""config.json of the Mamba families: Nemotron-H (arXiv 2504.03624) and Mamba-2 (arXiv 2405.21060)."""

import math
import warnings
from typing import Any

from jaxllm.config import (
    AttentionConfig,
    ConfigError,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MTPConfig,
    require,
)
from jaxllm.hf.fields import Fields, number
from jaxllm.hf.moe import NEMOTRON_FIELDS, read_nemotron_moe, write_nemotron_moe

LETTER_OF_BLOCK = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}

# transformers 5 clamps dt from below at time_step_min in prefill, but not in decode. The trained model has no clamp,
# so an export names the smallest step that its initialiser can still take the logarithm of.
NO_CLAMP = 1e-30


def _letters(fields: Fields, name: str, listed_name: str, old: tuple[str, ...] = ()) -> str:
    """A pattern, from the string or the list of block types."""
    text: str | None = fields.get(name)
    blocks = fields.get(listed_name, old=old)
    if blocks is not None:
        unknown = sorted(set(blocks) - set(LETTER_OF_BLOCK))
        require(not unknown, listed_name, unknown, f"known are {', '.join(LETTER_OF_BLOCK)}")
        listed = "".join(LETTER_OF_BLOCK[block] for block in blocks)
        require(text in (None, listed), name, text, f"{listed_name} says {listed!r}")
        text = listed
    if text is None:
        raise ConfigError(f"{name}: missing; give it or {listed_name}")
    return text


def _mtp(fields: Fields) -> MTPConfig | None:
    """Prediction blocks, which transformers' class leaves out and the checkpoint has."""
    blocks = fields.get("num_nextn_predict_layers", 0)
    if blocks == 0:
        fields.skip("mtp_layers_block_type", "mtp_hybrid_override_pattern")
        return None
    pattern = _letters(fields, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    return MTPConfig(pattern=pattern, blocks=blocks)


def _pattern(fields: Fields) -> str:
    """The main pattern; warns where the number of layers says otherwise."""
    text = _letters(fields, "hybrid_override_pattern", "layers_block_type", ("layer_types",))
    layers = fields.get("num_hidden_layers", len(text))
    if layers != len(text):
        warnings.warn(
            f"num_hidden_layers={layers} disagrees with the pattern's {len(text)} letters, which are used",
            stacklevel=5,
        )
    return text


MAMBA_FIELDS = [
    "mamba_num_heads",
    "mamba_head_dim",
    "ssm_state_size",
    "n_groups",
    "mamba_n_groups",
    "conv_kernel",
    "mamba_d_conv",
    "chunk_size",
    "mamba_chunk_size",
    "use_conv_bias",
    "mamba_conv_bias",
    "use_bias",
    "time_step_limit",
    "mamba_dt_limit",
]


def _mamba(fields: Fields) -> MambaConfig:
    return MambaConfig(
        num_heads=fields.need("mamba_num_heads"),
        head_dim=fields.get("mamba_head_dim", 64),
        state_size=fields.get("ssm_state_size", 128),
        n_groups=fields.get("n_groups", 8, old=("mamba_n_groups",)),
        conv_kernel=fields.get("conv_kernel", 4, old=("mamba_d_conv",)),
        chunk_size=fields.get("chunk_size", 128, old=("mamba_chunk_size",)),
        conv_bias=fields.get("use_conv_bias", True, old=("mamba_conv_bias",)),
        proj_bias=fields.get("use_bias", False),
        dt_limit=_dt_limit(fields),
    )


def _attention(fields: Fields) -> AttentionConfig:
    heads = fields.need("num_attention_heads")
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads", heads),
        # Early checkpoints have both names and mean the older one.
        head_dim=fields.get("attention_head_dim", fields.get("head_dim", 128)),
    )


def _mlp(fields: Fields) -> MLPConfig:
    return MLPConfig(fields.need("intermediate_size"), "relu2", fields.get("mlp_bias", False))


def _dt_limit(fields: Fields) -> tuple[float, float]:
    limit = fields.get("time_step_limit", (0.0, math.inf), old=("mamba_dt_limit",))
    require(
        isinstance(limit, list | tuple) and len(limit) == 2, "time_step_limit", limit, "must be [low, high]"
    )
    return number(limit[0]), number(limit[1])


def read_nemotron_h(fields: Fields) -> ModelConfig:
    """Nemotron-H, in the spellings of its remote code, of Mamba configs and of transformers 5.

    ``expand`` and the rope fields are there but the forward pass reads neither; ``residual_in_fp32`` is ignored by
    every implementation; the clamp of dt is ``time_step_limit`` (as trained), not transformers' ``time_step_min``.
    """
    pattern, mtp = _pattern(fields), _mtp(fields)
    letters = pattern + (mtp.pattern if mtp is not None else "")
    fields.only("mamba_hidden_act", "silu", "the convolution's activation is silu")
    fields.only("mlp_hidden_act", "relu2", "the MLP's activation is relu2")
    fields.only("attention_bias", False, "attention has no biases")
    fields.only("mamba_proj_bias", False, "projection biases are named use_bias")
    fields.only("sliding_window", None, "attention has no window")
    fields.skip(
        "expand", "mamba_expand", "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters"
    )
    fields.skip("residual_in_fp32", "mamba_ssm_cache_dtype")
    # How servers overlap the shared expert with the others.
    fields.skip("moe_shared_expert_overlap")
    # A pattern may lack a letter whose fields are there all the same.
    fields.skip(*MAMBA_FIELDS, *NEMOTRON_FIELDS)
    fields.skip("num_attention_heads", "num_key_value_heads", "head_dim", "attention_head_dim")
    fields.skip("intermediate_size", "mlp_bias")
    return ModelConfig(
        vocab_size=fields.need("vocab_size"),
        hidden_size=fields.need("hidden_size"),
        pattern=pattern,
        mamba=_mamba(fields) if "M" in letters else None,
        attention=_attention(fields) if "*" in letters else None,
        mlp=_mlp(fields) if "-" in letters else None,
        moe=read_nemotron_moe(fields) if "E" in letters else None,
        mtp=mtp,
        norm_eps=fields.get("layer_norm_epsilon", 1e-5, old=("rms_norm_eps",)),
        norm_cast="last",
        tie_embeddings=fields.get("tie_word_embeddings", False),
        init_std=fields.get("initializer_range", 0.02),
    )


def _plain(cfg: ModelConfig, *, norm_cast: str, letters: str) -> None:
    """Refuse what neither family has."""
    foreign = sorted(set(cfg.letters) - set(letters))
    require(
        not foreign, "pattern", cfg.pattern, f"has {', '.join(foreign)}; the family has {', '.join(letters)}"
    )
    require(cfg.norm_cast == norm_cast, "norm_cast", cfg.norm_cast, f"the family's is {norm_cast!r}")
    m = cfg.mamba if "M" in cfg.letters else None
    if m is not None:
        require(
            m.gate_groups == m.n_groups,
            "mamba.norm_groups",
            m.norm_groups,
            f"the family's is n_groups={m.n_groups}",
        )


def _finite(limit: tuple[float, float]) -> list[float]:
    # "Infinity" is not JSON.
    return [limit[0], min(limit[1], 1e308)]


def write_nemotron_h(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of Nemotron-H; ``time_step_min`` carries the lower limit of dt, for transformers' own class."""
    _plain(cfg, norm_cast="last", letters="M*-E")
    out: dict[str, Any] = {
        "hybrid_override_pattern": cfg.pattern,
        "num_hidden_layers": len(cfg.pattern),
        "layer_norm_epsilon": cfg.norm_eps,
        "residual_in_fp32": False,
        "attention_bias": False,
        "num_nextn_predict_layers": 0 if cfg.mtp is None else cfg.mtp.blocks,
        # For servers that ask for a longest sequence; nothing in the model depends on it.
        "max_position_embeddings": 131072,
    }
    if cfg.mtp is not None:
        out["mtp_hybrid_override_pattern"] = cfg.mtp.pattern
    if cfg.mamba is not None and "M" in cfg.letters:
        m = cfg.mamba
        out |= {
            "mamba_num_heads": m.num_heads,
            "mamba_head_dim": m.head_dim,
            "mamba_hidden_act": "silu",
            "ssm_state_size": m.state_size,
            "n_groups": m.n_groups,
            "conv_kernel": m.conv_kernel,
            "chunk_size": m.chunk_size,
            "use_conv_bias": m.conv_bias,
            "use_bias": m.proj_bias,
            "expand": max(1, round(m.inner_size / cfg.hidden_size)),
            "time_step_limit": _finite(m.dt_limit),
            "time_step_min": m.dt_limit[0] or NO_CLAMP,
        }
        if m.dt_limit[1] < math.inf:
            warnings.warn(
                f"mamba.dt_limit={m.dt_limit}: transformers' NemotronHForCausalLM ignores the upper limit of dt",
                stacklevel=4,
            )
    if cfg.attention is not None and "*" in cfg.letters:
        a = cfg.attention
        for name, none in (("rope", None), ("qk_norm", False), ("qkv_bias", False), ("out_bias", False)):
            require(
                getattr(a, name) == none, f"attention.{name}", getattr(a, name), f"the family's is {none}"
            )
        out |= {
            "num_attention_heads": a.num_heads,
            "num_key_value_heads": a.num_kv_heads,
            "head_dim": a.head_dim,
        }
    if cfg.mlp is not None and "-" in cfg.letters:
        require(cfg.mlp.activation == "relu2", "mlp.activation", cfg.mlp.activation, "the family's is relu2")
        out |= {
            "intermediate_size": cfg.mlp.intermediate_size,
            "mlp_hidden_act": "relu2",
            "mlp_bias": cfg.mlp.bias,
        }
    return out | (write_nemotron_moe(cfg) if "E" in cfg.letters else {})


def read_mamba2(fields: Fields) -> ModelConfig:
    """Mamba-2 as transformers has it; ``residual_in_fp32`` matters below float32 only and is not reproduced."""
    hidden, layers = fields.need("hidden_size"), fields.need("num_hidden_layers")
    heads, head_dim = fields.need("num_heads"), fields.get("head_dim", 64)
    expand = fields.get("expand", 2)
    require(
        int(expand * hidden) == heads * head_dim,
        "expand",
        expand,
        f"expand * hidden_size must be num_heads * head_dim = {heads * head_dim}",
    )
    fields.only("hidden_act", "silu", "the convolution's activation is silu")
    fields.only("rms_norm", True, "norms are RMSNorm")
    # norm_before_gate is in converted checkpoints with either value and nothing reads it: the gate comes first.
    fields.skip("residual_in_fp32", "norm_before_gate")
    layer_types = fields.get("layer_types", [])
    require(
        set(layer_types) <= {"linear_attention", "mamba"},
        "layer_types",
        layer_types,
        "all are linear_attention",
    )
    return ModelConfig(
        vocab_size=fields.need("vocab_size"),
        hidden_size=hidden,
        pattern="M" * layers,
        mamba=MambaConfig(
            num_heads=heads,
            head_dim=head_dim,
            state_size=fields.get("state_size", 128),
            n_groups=fields.get("n_groups", 8),
            conv_kernel=fields.get("conv_kernel", 4),
            chunk_size=fields.get("chunk_size", 256),
            conv_bias=fields.get("use_conv_bias", True),
            proj_bias=fields.get("use_bias", False),
            dt_limit=_dt_limit(fields),
        ),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        norm_cast="first",
        tie_embeddings=fields.get("tie_word_embeddings", False),
        init_std=fields.get("initializer_range", 0.1),
    )


def write_mamba2(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of Mamba-2."""
    _plain(cfg, norm_cast="first", letters="M")
    m = cfg.mamba
    assert m is not None
    require(
        m.inner_size % cfg.hidden_size == 0,
        "mamba.num_heads",
        m.num_heads,
        f"num_heads * head_dim = {m.inner_size} must be a multiple of hidden_size={cfg.hidden_size}",
    )
    return {
        "num_hidden_layers": len(cfg.pattern),
        "num_heads": m.num_heads,
        "head_dim": m.head_dim,
        "state_size": m.state_size,
        "n_groups": m.n_groups,
        "conv_kernel": m.conv_kernel,
        "chunk_size": m.chunk_size,
        "expand": m.inner_size // cfg.hidden_size,
        "hidden_act": "silu",
        "use_conv_bias": m.conv_bias,
        "use_bias": m.proj_bias,
        "layer_norm_epsilon": cfg.norm_eps,
        "residual_in_fp32": cfg.precision.compute == "float32",
        "time_step_limit": _finite(m.dt_limit),
    }
