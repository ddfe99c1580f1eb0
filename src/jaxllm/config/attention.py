"""Settings of attention and its rotary positions."""

from dataclasses import dataclass
from typing import Literal

from jaxllm.config.checks import one_of, positive_fields, require


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864), half-split layout.

    Attributes:
        theta: base of the frequencies.
        scaling: "none", "linear" (positions / factor) or "llama3" (smooth scaling by wavelength).
        factor: scaling factor.
        low_freq_factor: llama3: wavelengths above original / this are divided by factor.
        high_freq_factor: llama3: wavelengths under original / this are kept.
        original_max_position: llama3: context length before scaling.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        require(self.theta > 0, "rope.theta", self.theta, "must be positive")
        one_of("rope.scaling", self.scaling, "none", "linear", "llama3")
        require(self.factor >= 1, "rope.factor", self.factor, "must be at least 1")


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention.

    Attributes:
        num_heads: H.
        num_kv_heads: K; query head h reads kv head h // (H / K).
        head_dim: d; H * d need not equal the hidden size.
        rope: rotary positions, or None for no positional term (Nemotron-H).
        window: keys that a ``W`` layer sees, the token itself included; ``*`` layers see all.
        qk_norm: RMSNorm over head_dim on queries and keys before RoPE (Qwen3).
        qkv_bias: biases of q, k and v (Qwen2).
        out_bias: bias of the output projection.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    rope: RopeConfig | None = None
    window: int | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        positive_fields(self, "attention", "num_heads", "num_kv_heads", "head_dim", optional=("window",))
        require(
            self.num_heads % self.num_kv_heads == 0,
            "attention.num_kv_heads",
            self.num_kv_heads,
            f"must divide attention.num_heads={self.num_heads}",
        )
        if self.rope is not None:
            require(self.head_dim % 2 == 0, "attention.head_dim", self.head_dim, "must be even with rope")
