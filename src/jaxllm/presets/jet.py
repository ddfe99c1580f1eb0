"""Jet-Nemotron: one to try here, and the published ones."""

from jaxllm.config import AttentionConfig, JetConfig, MLPConfig, ModelConfig, RopeConfig


def _jet(
    letters: str,
    *,
    vocab_size: int = 151936,
    hidden_size: int,
    jet: JetConfig,
    heads: int,
    kv_heads: int = 2,
    head_dim: int = 128,
    window: int,
    intermediate_size: int,
) -> ModelConfig:
    """Jet-Nemotron: a JetBlock, attention or attention in a window, then an MLP, per letter."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        pattern="".join(f"{letter}-" for letter in letters),
        jet=jet,
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=RopeConfig(theta=1e6),
            window=window,
            qkv_bias=True,
        ),
        mlp=MLPConfig(intermediate_size, "swiglu"),
        norm_eps=1e-6,
        norm_cast="last",
        tie_embeddings=True,
    )


def jet_tiny() -> ModelConfig:
    """3.4M parameters in the layout of Jet-Nemotron, to try it on a CPU."""
    return _jet(
        "JJ*JJW",
        vocab_size=4096,
        hidden_size=192,
        jet=JetConfig(num_heads=3, key_head_dim=32, value_head_dim=64),
        heads=3,
        kv_heads=1,
        head_dim=64,
        window=128,
        intermediate_size=512,
    )


def jet_nemotron_2b() -> ModelConfig:
    """jet-ai/Jet-Nemotron-2B, 1.97B parameters (arXiv 2508.15884)."""
    return _jet(
        "JJJJJJJJJJJJJJ*JJJJ*WWJJJJJJ",
        hidden_size=1536,
        jet=JetConfig(num_heads=12, key_head_dim=96, value_head_dim=256),
        heads=12,
        window=1152,
        intermediate_size=8960,
    )


def jet_nemotron_4b() -> ModelConfig:
    """jet-ai/Jet-Nemotron-4B, 3.96B parameters (arXiv 2508.15884)."""
    return _jet(
        "JJJJJWJJJJJJJJJJW*JW*WWJJWJWJJJJ*JJJ",
        hidden_size=2048,
        jet=JetConfig(num_heads=16, key_head_dim=128, value_head_dim=256),
        heads=16,
        window=2048,
        intermediate_size=11008,
    )
