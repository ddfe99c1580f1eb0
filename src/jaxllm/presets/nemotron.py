"""Hybrids in the layout of Nemotron-H: four to train here, and the published ones."""

from jaxllm.config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, MoEConfig, MTPConfig


def _hybrid(
    pattern: str,
    *,
    vocab_size: int,
    hidden_size: int,
    mamba_heads: int,
    state_size: int = 128,
    n_groups: int = 8,
    chunk_size: int = 128,
    mamba_head_dim: int = 64,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    intermediate_size: int | None = None,
    moe: MoEConfig | None = None,
    mtp: MTPConfig | None = None,
) -> ModelConfig:
    """A hybrid in the layout of Nemotron-H; defaults are the 8B's."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        pattern=pattern,
        mamba=MambaConfig(
            num_heads=mamba_heads,
            head_dim=mamba_head_dim,
            state_size=state_size,
            n_groups=n_groups,
            chunk_size=chunk_size,
        ),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim),
        mlp=None if intermediate_size is None else MLPConfig(intermediate_size, "relu2"),
        moe=moe,
        mtp=mtp,
    )


def quickstart() -> ModelConfig:
    """3.3M parameters: trains in minutes on two CPU cores.

    Four Mamba-2 layers of width 256 took a CPU 2.8 times what four of attention took, so there are few of them.
    """
    return _hybrid(
        "M-*-M-*-",
        vocab_size=4096,
        hidden_size=192,
        mamba_heads=4,
        state_size=64,
        n_groups=1,
        chunk_size=64,
        heads=3,
        kv_heads=1,
        head_dim=64,
        intermediate_size=768,
    )


def small() -> ModelConfig:
    """119M parameters: for one GPU."""
    return _hybrid(
        "M-M-M*-M-M-M*-M-M-M-M-",
        vocab_size=16384,
        hidden_size=768,
        mamba_heads=24,
        n_groups=4,
        heads=12,
        kv_heads=4,
        head_dim=64,
        intermediate_size=3072,
    )


def medium() -> ModelConfig:
    """480M parameters: for one large GPU."""
    return _hybrid(
        "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-",
        vocab_size=32768,
        hidden_size=1280,
        mamba_heads=40,
        n_groups=8,
        heads=20,
        kv_heads=4,
        head_dim=64,
        intermediate_size=5120,
    )


_NEMOTRON_H_52 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"


def nemotron_h_4b() -> ModelConfig:
    """nvidia/Nemotron-H-4B-Base-8K, 4.49B parameters (arXiv 2504.03624; pruned from the 8B)."""
    return _hybrid(
        _NEMOTRON_H_52, vocab_size=131072, hidden_size=3072, mamba_heads=112, intermediate_size=12288
    )


def nemotron_h_8b() -> ModelConfig:
    """nvidia/Nemotron-H-8B-Base-8K, 8.10B parameters (arXiv 2504.03624)."""
    return _hybrid(
        _NEMOTRON_H_52, vocab_size=131072, hidden_size=4096, mamba_heads=128, intermediate_size=21504
    )


def nemotron_h_56b() -> ModelConfig:
    """nvidia/Nemotron-H-56B-Base-8K (arXiv 2504.03624); pattern from NVIDIA's Megatron-Bridge."""
    return _hybrid(
        "M-M-M-M*" + "-M-M-M-M-M*" * 9 + "-M-M-M-M-M-",
        vocab_size=131072,
        hidden_size=8192,
        mamba_heads=256,
        state_size=256,
        heads=64,
        intermediate_size=32768,
    )


def nemotron_3_tiny() -> ModelConfig:
    """1.5M parameters, 0.9M of them active: Nemotron 3 with a latent width, in seconds on a CPU."""
    return _hybrid(
        "MEM*EME",
        vocab_size=1024,
        hidden_size=128,
        mamba_heads=4,
        mamba_head_dim=32,
        state_size=32,
        n_groups=2,
        chunk_size=64,
        heads=4,
        kv_heads=2,
        head_dim=32,
        moe=MoEConfig(
            num_experts=16,
            top_k=4,
            intermediate_size=128,
            shared_intermediate_size=128,
            scaling=2.5,
            latent_size=64,
        ),
    )


def nemotron_3_nano_30b_a3b() -> ModelConfig:
    """nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B, 31.6B parameters, 3.6B active (arXiv 2512.20848)."""
    return _hybrid(
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        vocab_size=131072,
        hidden_size=2688,
        mamba_heads=64,
        heads=32,
        kv_heads=2,
        moe=MoEConfig(
            num_experts=128,
            top_k=6,
            intermediate_size=1856,
            shared_intermediate_size=3712,
            scaling=2.5,
        ),
    )


def nemotron_3_super() -> ModelConfig:
    """nvidia/NVIDIA-Nemotron-3-Super-120B-A12B, 120.7B parameters, 12.8B active without its prediction block (2604.12374)."""
    return _hybrid(
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
        vocab_size=131072,
        hidden_size=4096,
        mamba_heads=128,
        heads=32,
        kv_heads=2,
        moe=MoEConfig(
            num_experts=512,
            top_k=22,
            intermediate_size=2688,
            shared_intermediate_size=5376,
            scaling=5.0,
            latent_size=1024,
        ),
        mtp=MTPConfig("*E", 1),
    )
