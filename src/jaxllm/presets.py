"""Ready configurations: four hybrids to train here, and published models by name.

Published ones are their config.json on the Hugging Face hub; their vocabularies are those of the checkpoints.
"""

import difflib
from collections.abc import Callable

from jaxllm.config import (
    AttentionConfig,
    ConfigError,
    JetConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RopeConfig,
)


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


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    function.__name__: function
    for function in (
        quickstart,
        small,
        medium,
        nemotron_h_4b,
        nemotron_h_8b,
        nemotron_h_56b,
        nemotron_3_tiny,
        nemotron_3_nano_30b_a3b,
        nemotron_3_super,
        mamba2_130m,
        mamba2_370m,
        mamba2_780m,
        mamba2_1_3b,
        mamba2_2_7b,
        llama_3_2_1b,
        llama_3_1_8b,
        qwen2_5_0_5b,
        qwen2_5_7b,
        qwen3_0_6b,
        qwen3_8b,
        jet_tiny,
        jet_nemotron_2b,
        jet_nemotron_4b,
    )
}


def preset(name: str) -> ModelConfig:
    """The configuration called ``name``; hyphens and dots may stand for underscores.

    Raises:
        ConfigError: there is no such preset; the message has the nearest name and all names.
    """
    key = name.lower().replace("-", "_").replace(".", "_")
    if key not in PRESETS:
        near = difflib.get_close_matches(key, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"preset={name!r}: {hint}presets are {', '.join(PRESETS)}")
    return PRESETS[key]()
