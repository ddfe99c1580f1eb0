"""Transformers as published: Llama and Qwen."""

from jaxllm.config import AttentionConfig, MLPConfig, ModelConfig, RopeConfig


def _transformer(
    layers: int,
    *,
    vocab_size: int,
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    rope: RopeConfig,
    eps: float,
    tied: bool,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        pattern="*-" * layers,
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
        ),
        mlp=MLPConfig(intermediate_size, "swiglu"),
        norm_eps=eps,
        norm_cast="first",
        tie_embeddings=tied,
    )


def _llama3_rope(factor: float) -> RopeConfig:
    return RopeConfig(theta=500000.0, scaling="llama3", factor=factor)


def llama_3_2_1b() -> ModelConfig:
    """meta-llama/Llama-3.2-1B."""
    return _transformer(
        16,
        vocab_size=128256,
        hidden_size=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        intermediate_size=8192,
        rope=_llama3_rope(32.0),
        eps=1e-5,
        tied=True,
    )


def llama_3_1_8b() -> ModelConfig:
    """meta-llama/Llama-3.1-8B (arXiv 2407.21783)."""
    return _transformer(
        32,
        vocab_size=128256,
        hidden_size=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        rope=_llama3_rope(8.0),
        eps=1e-5,
        tied=False,
    )


def qwen2_5_0_5b() -> ModelConfig:
    """Qwen/Qwen2.5-0.5B (arXiv 2412.15115)."""
    return _transformer(
        24,
        vocab_size=151936,
        hidden_size=896,
        heads=14,
        kv_heads=2,
        head_dim=64,
        intermediate_size=4864,
        rope=RopeConfig(theta=1e6),
        eps=1e-6,
        tied=True,
        qkv_bias=True,
    )


def qwen2_5_7b() -> ModelConfig:
    """Qwen/Qwen2.5-7B (arXiv 2412.15115)."""
    return _transformer(
        28,
        vocab_size=152064,
        hidden_size=3584,
        heads=28,
        kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        rope=RopeConfig(theta=1e6),
        eps=1e-6,
        tied=False,
        qkv_bias=True,
    )


def qwen3_0_6b() -> ModelConfig:
    """Qwen/Qwen3-0.6B (arXiv 2505.09388)."""
    return _transformer(
        28,
        vocab_size=151936,
        hidden_size=1024,
        heads=16,
        kv_heads=8,
        head_dim=128,
        intermediate_size=3072,
        rope=RopeConfig(theta=1e6),
        eps=1e-6,
        tied=True,
        qk_norm=True,
    )


def qwen3_8b() -> ModelConfig:
    """Qwen/Qwen3-8B (arXiv 2505.09388)."""
    return _transformer(
        36,
        vocab_size=151936,
        hidden_size=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate_size=12288,
        rope=RopeConfig(theta=1e6),
        eps=1e-6,
        tied=False,
        qk_norm=True,
    )
