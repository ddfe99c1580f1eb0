"""Mixtures of experts: Mixtral (arXiv 2401.04088), Qwen3-MoE (2505.09388) and the fields of Nemotron 3's (2512.20848)."""

from typing import Any

from jaxllm.config import ModelConfig, MoEConfig, require
from jaxllm.hf.fields import Fields
from jaxllm.hf.transformer import expect, read_layers, write_layers


def _soft(experts: int, top_k: int, width: int, norm: bool) -> MoEConfig:
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=width,
        activation="swiglu",
        router="softmax",
        correction_bias=False,
        norm_topk=norm,
    )


def _window(fields: Fields, layers: int, window: int | None) -> dict[str, Any]:
    """Both families slide in all layers or in none."""
    return {"letters": ("*" if window is None else "W") * layers, "window": window}


def read_mixtral(fields: Fields) -> ModelConfig:
    """Mixtral: experts in every layer, a window in all of them or in none."""
    layers = fields.need("num_hidden_layers")
    moe = _soft(
        fields.need("num_local_experts", old=("num_experts",)),
        fields.get("num_experts_per_tok", 2),
        fields.need("intermediate_size"),
        True,
    )
    return read_layers(
        fields,
        eps=1e-5,
        head_dim=fields.get("head_dim"),
        qkv_bias=False,
        out_bias=False,
        qk_norm=False,
        mlp_bias=False,
        ffn="E" * layers,
        moe=moe,
        rope_theta=1e6,
        **_window(fields, layers, fields.get("sliding_window")),
    )


def _gated(cfg: ModelConfig) -> MoEConfig:
    """The experts of ``cfg``, which are those of both families."""
    m = cfg.moe
    assert m is not None
    expect(
        m,
        "moe",
        activation="swiglu",
        router="softmax",
        correction_bias=False,
        shared_intermediate_size=None,
        latent_size=None,
        n_groups=1,
        scaling=1.0,
    )
    return m


def _one_window(cfg: ModelConfig) -> int | None:
    mixers = set(cfg.pattern[::2])
    require(len(mixers) == 1, "pattern", cfg.pattern, "the family slides in all layers or in none")
    assert cfg.attention is not None
    return cfg.attention.window if mixers == {"W"} else None


def write_mixtral(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of Mixtral."""
    out = write_layers(cfg, letters="*W", ffn="E")
    expect(cfg.attention, "attention", qk_norm=False, qkv_bias=False, out_bias=False)
    m = _gated(cfg)
    expect(m, "moe", norm_topk=True)
    return out | {
        "num_local_experts": m.num_experts,
        "num_experts_per_tok": m.top_k,
        "intermediate_size": m.intermediate_size,
        "sliding_window": _one_window(cfg),
        "router_jitter_noise": 0.0,
    }


def read_qwen3_moe(fields: Fields) -> ModelConfig:
    """Qwen3-MoE; layers of ``mlp_only_layers``, and those between the steps of ``decoder_sparse_step``, are dense."""
    layers, step = fields.need("num_hidden_layers"), fields.get("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", [])
    ffn = "".join("-" if i in dense or (i + 1) % step else "E" for i in range(layers))
    moe = None
    if "E" in ffn:
        moe = _soft(
            fields.need("num_experts", old=("num_local_experts",)),
            fields.need("num_experts_per_tok"),
            fields.need("moe_intermediate_size"),
            fields.get("norm_topk_prob", False),
        )
    bias = fields.get("attention_bias", False)
    used = fields.get("use_sliding_window", False)
    # transformers' class reads no first layer: where it slides at all, it slides in every layer.
    fields.skip("sliding_window", "max_window_layers", "intermediate_size")
    return read_layers(
        fields,
        eps=1e-6,
        head_dim=fields.get("head_dim"),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        mlp_bias=False,
        ffn=ffn,
        moe=moe,
        **_window(fields, layers, fields.data.get("sliding_window", 4096) if used else None),
    )


def write_qwen3_moe(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of Qwen3-MoE."""
    require("E" in cfg.pattern, "pattern", cfg.pattern, "the family has experts")
    out = write_layers(cfg, letters="*W", ffn="E-")
    expect(cfg.attention, "attention", qk_norm=True)
    m, a = _gated(cfg), cfg.attention
    assert a is not None
    require(a.qkv_bias == a.out_bias, "attention.out_bias", a.out_bias, f"must be qkv_bias={a.qkv_bias}")
    if "-" in cfg.pattern:
        expect(cfg.mlp, "mlp", bias=False)
    window = _one_window(cfg)
    return out | {
        "attention_bias": a.qkv_bias,
        "num_experts": m.num_experts,
        "num_experts_per_tok": m.top_k,
        "moe_intermediate_size": m.intermediate_size,
        "norm_topk_prob": m.norm_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, letter in enumerate(cfg.pattern[1::2]) if letter == "-"],
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


NEMOTRON_FIELDS = (
    "n_routed_experts",
    "num_local_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "num_experts_per_tok",
    "norm_topk_prob",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
)


def read_nemotron_moe(fields: Fields) -> MoEConfig:
    """Experts of Nemotron 3. ``n_shared_experts`` is not read: all shared experts are one MLP, whose width is given."""
    fields.only("mlp_bias", False, "experts have no biases")
    shared = fields.need("moe_shared_expert_intermediate_size")
    # transformers' class would take intermediate_size for 0.
    require(shared > 0, "moe_shared_expert_intermediate_size", shared, "must be positive")
    return MoEConfig(
        num_experts=fields.need("n_routed_experts", old=("num_local_experts",)),
        top_k=fields.need("num_experts_per_tok"),
        intermediate_size=fields.need("moe_intermediate_size"),
        shared_intermediate_size=shared,
        norm_topk=fields.get("norm_topk_prob", True),
        scaling=float(fields.get("routed_scaling_factor", 1.0)),
        n_groups=fields.get("n_group", 1),
        topk_groups=fields.get("topk_group", 1),
        latent_size=fields.get("moe_latent_size"),
    )


def write_nemotron_moe(cfg: ModelConfig) -> dict[str, Any]:
    """Fields of the experts of Nemotron 3."""
    m = cfg.moe
    assert m is not None
    expect(m, "moe", activation="relu2", router="sigmoid", correction_bias=True)
    require(
        m.shared_intermediate_size is not None,
        "moe.shared_intermediate_size",
        None,
        "the family has a shared expert",
    )
    if cfg.mlp is not None and "-" in cfg.letters:
        expect(cfg.mlp, "mlp", bias=False)
    return {
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "n_routed_experts": m.num_experts,
        "n_shared_experts": 1,
        "moe_intermediate_size": m.intermediate_size,
        "moe_shared_expert_intermediate_size": m.shared_intermediate_size,
        "moe_latent_size": m.latent_size,
        "num_experts_per_tok": m.top_k,
        "norm_topk_prob": m.norm_topk,
        "routed_scaling_factor": m.scaling,
        "n_group": m.n_groups,
        "topk_group": m.topk_groups,
    }
