"""Mamba-2 as published."""

from jaxllm.config import MambaConfig, ModelConfig


def _mamba2(hidden_size: int, layers: int) -> ModelConfig:
    """state-spaces/mamba2-* as converted for transformers: GPT-NeoX vocabulary padded to 50288."""
    return ModelConfig(
        vocab_size=50288,
        hidden_size=hidden_size,
        pattern="M" * layers,
        mamba=MambaConfig(
            num_heads=2 * hidden_size // 64, head_dim=64, state_size=128, n_groups=1, chunk_size=256
        ),
        norm_cast="first",
        tie_embeddings=True,
        init_std=0.1,
    )


def mamba2_130m() -> ModelConfig:
    """state-spaces/mamba2-130m (arXiv 2405.21060)."""
    return _mamba2(768, 24)


def mamba2_370m() -> ModelConfig:
    """state-spaces/mamba2-370m (arXiv 2405.21060)."""
    return _mamba2(1024, 48)


def mamba2_780m() -> ModelConfig:
    """state-spaces/mamba2-780m (arXiv 2405.21060)."""
    return _mamba2(1536, 48)


def mamba2_1_3b() -> ModelConfig:
    """state-spaces/mamba2-1.3b (arXiv 2405.21060)."""
    return _mamba2(2048, 48)


def mamba2_2_7b() -> ModelConfig:
    """state-spaces/mamba2-2.7b (arXiv 2405.21060)."""
    return _mamba2(2560, 64)
