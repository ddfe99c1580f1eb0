"""Settings of the recurrent mixers."""

import math
from dataclasses import dataclass

from jaxllm.config.checks import positive_fields, require


@dataclass(frozen=True)
class MambaConfig:
    """Mamba-2 mixer (arXiv 2405.21060; layout of Nemotron-H, arXiv 2504.03624).

    Attributes:
        num_heads: H; the inner width is H * P, whatever the hidden size.
        head_dim: P.
        state_size: N.
        n_groups: heads per group share B and C; heads of a group are contiguous.
        conv_kernel: width of the causal convolution over x, B and C.
        chunk_size: chunk of the scan; the result does not depend on it.
        dt_limit: clamp of dt after softplus; (0, inf) is none.
        norm_groups: groups of the gated RMSNorm; None takes n_groups (Nemotron-H); Mamba-2 checkpoints have 1.
        conv_bias: bias of the convolution.
        proj_bias: biases of the two projections.
    """

    num_heads: int
    head_dim: int = 64
    state_size: int = 128
    n_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 128
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_groups: int | None = None
    conv_bias: bool = True
    proj_bias: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dt_limit", tuple(float(v) for v in self.dt_limit))
        sizes = ("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "chunk_size")
        positive_fields(self, "mamba", *sizes)
        require(self.conv_kernel >= 2, "mamba.conv_kernel", self.conv_kernel, "must be at least 2")
        require(
            self.num_heads % self.n_groups == 0,
            "mamba.n_groups",
            self.n_groups,
            f"must divide mamba.num_heads={self.num_heads}",
        )
        require(
            self.inner_size % self.gate_groups == 0 and self.gate_groups >= 1,
            "mamba.norm_groups",
            self.norm_groups,
            f"must divide num_heads * head_dim = {self.inner_size}",
        )
        low, high = self.dt_limit
        require(0 <= low < high, "mamba.dt_limit", self.dt_limit, "must be (low, high) with 0 <= low < high")

    @property
    def inner_size(self) -> int:
        """H * P."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner_size + 2 * self.n_groups * self.state_size

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, P, N) of the recurrence's state."""
        return self.num_heads, self.head_dim, self.state_size

    @property
    def gate_groups(self) -> int:
        """Groups of the gated norm."""
        return self.n_groups if self.norm_groups is None else self.norm_groups


@dataclass(frozen=True)
class GatedDeltaConfig:
    """Gated DeltaNet mixer (arXiv 2412.06464), with the options of Qwen3-Next and OLMo-Hybrid.

    Attributes:
        num_heads: H, heads of queries and keys.
        num_value_heads: Hv; value head h reads the query and key head h // (Hv / H). None: as many as ``num_heads``.
        key_head_dim: dk.
        value_head_dim: dv.
        conv_kernel: width of the causal convolution over q, k and v.
        chunk_size: chunk of the recurrence; the result does not depend on it.
        allow_neg_eigval: writes of strength up to 2 instead of 1, so that a state can change its sign (OLMo-Hybrid).
        norm_eps: epsilon of the gated norm; None takes the model's (Qwen3-Next).
    """

    num_heads: int
    num_value_heads: int | None = None
    key_head_dim: int = 128
    value_head_dim: int = 128
    conv_kernel: int = 4
    chunk_size: int = 64
    allow_neg_eigval: bool = False
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        sizes = ("num_heads", "key_head_dim", "value_head_dim", "conv_kernel", "chunk_size")
        positive_fields(self, "delta", *sizes)
        require(self.conv_kernel >= 2, "delta.conv_kernel", self.conv_kernel, "must be at least 2")
        require(
            self.value_heads >= 1 and self.value_heads % self.num_heads == 0,
            "delta.num_value_heads",
            self.num_value_heads,
            f"must be a multiple of delta.num_heads={self.num_heads}",
        )
        positive_eps = self.norm_eps is None or self.norm_eps > 0
        require(positive_eps, "delta.norm_eps", self.norm_eps, "must be positive, or None for the model's")

    @property
    def value_heads(self) -> int:
        """Hv."""
        return self.num_heads if self.num_value_heads is None else self.num_value_heads

    @property
    def key_size(self) -> int:
        """H * dk."""
        return self.num_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Hv * dv."""
        return self.value_heads * self.value_head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: q, k and v."""
        return 2 * self.key_size + self.value_size

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(Hv, dk, dv) of the recurrence's state."""
        return self.value_heads, self.key_head_dim, self.value_head_dim


@dataclass(frozen=True)
class JetConfig:
    """JetBlock mixer (Jet-Nemotron, arXiv 2508.15884): the gated delta rule with an input-generated convolution of v.

    Attributes:
        num_heads: H, heads of queries, keys and values.
        key_head_dim: dk.
        value_head_dim: dv.
        conv_kernel: taps of the generated kernels.
        generator_reduction: the generator's hidden width is H * dv divided by this.
        norm_eps: epsilon of the gated norm.
        chunk_size: chunk of the recurrence; the result does not depend on it.
    """

    num_heads: int
    key_head_dim: int = 96
    value_head_dim: int = 256
    conv_kernel: int = 4
    generator_reduction: int = 8
    norm_eps: float = 1e-5
    chunk_size: int = 64

    def __post_init__(self) -> None:
        sizes = ("num_heads", "key_head_dim", "value_head_dim", "conv_kernel", "chunk_size")
        positive_fields(self, "jet", *sizes, "generator_reduction")
        require(self.conv_kernel >= 2, "jet.conv_kernel", self.conv_kernel, "must be at least 2")
        require(
            self.value_size >= self.generator_reduction,
            "jet.generator_reduction",
            self.generator_reduction,
            f"must be at most num_heads * value_head_dim = {self.value_size}",
        )
        require(self.norm_eps > 0, "jet.norm_eps", self.norm_eps, "must be positive")

    @property
    def key_size(self) -> int:
        """H * dk."""
        return self.num_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """H * dv."""
        return self.num_heads * self.value_head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: v."""
        return self.value_size

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, dk, dv) of the recurrence's state."""
        return self.num_heads, self.key_head_dim, self.value_head_dim

    @property
    def generator_size(self) -> int:
        """Hidden width of the kernel generator."""
        return self.value_size // self.generator_reduction
