"""Settings of the dense and the sparse feed-forward blocks."""

from dataclasses import dataclass
from typing import Literal

from jaxllm.config.checks import one_of, positive_fields, require


@dataclass(frozen=True)
class MLPConfig:
    """Feed-forward block: ``relu2`` is down(relu(up x)^2), ``swiglu`` is down(silu(gate x) * up x)."""

    intermediate_size: int
    activation: Literal["relu2", "swiglu"] = "relu2"
    bias: bool = False

    def __post_init__(self) -> None:
        positive_fields(self, "mlp", "intermediate_size")
        one_of("mlp.activation", self.activation, "relu2", "swiglu")


@dataclass(frozen=True)
class MoEConfig:
    """Sparse mixture of experts (Nemotron 3, arXiv 2512.20848 and 2512.20856; DeepSeek-V3, 2412.19437; Mixtral, 2401.04088).

    Attributes:
        num_experts: E; routed experts.
        top_k: experts of each token.
        intermediate_size: F of each routed expert.
        shared_intermediate_size: width of the MLP that every token goes through besides; None (or 0): there is none.
        activation: of all experts, as in :class:`MLPConfig`.
        router: "sigmoid" scores each expert by itself, "softmax" all of them together.
        correction_bias: a bias per expert is added to the scores to select by, not to those to combine by; training
            moves it towards an even load, without a gradient (arXiv 2408.15664).
        norm_topk: the chosen scores are divided by their sum.
        scaling: factor of the combined experts, after ``norm_topk``.
        n_groups: groups of consecutive experts of which ``topk_groups`` may be chosen from (DeepSeek-V3).
        topk_groups: those with the largest sum of their two best scores.
        latent_size: width in which the routed experts work, between two projections that they share (LatentMoE); None:
            the hidden size, without projections.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int | None = None
    activation: Literal["relu2", "swiglu"] = "relu2"
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    correction_bias: bool = True
    norm_topk: bool = True
    scaling: float = 1.0
    n_groups: int = 1
    topk_groups: int = 1
    latent_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared_intermediate_size", self.shared_intermediate_size or None)
        sizes = ("num_experts", "top_k", "intermediate_size", "n_groups", "topk_groups")
        positive_fields(self, "moe", *sizes, optional=("shared_intermediate_size", "latent_size"))
        one_of("moe.activation", self.activation, "relu2", "swiglu")
        one_of("moe.router", self.router, "sigmoid", "softmax")
        require(self.scaling > 0, "moe.scaling", self.scaling, "must be positive")
        require(
            self.top_k <= self.num_experts,
            "moe.top_k",
            self.top_k,
            f"must be at most moe.num_experts={self.num_experts}",
        )
        grouped = self.n_groups == 1 or (self.num_experts % self.n_groups == 0 and self.group_size >= 2)
        require(
            grouped,
            "moe.n_groups",
            self.n_groups,
            f"must divide moe.num_experts={self.num_experts} into groups of at least 2, or be 1",
        )
        require(
            self.topk_groups <= self.n_groups,
            "moe.topk_groups",
            self.topk_groups,
            f"must be at most moe.n_groups={self.n_groups}",
        )
        require(
            self.top_k <= self.topk_groups * self.group_size,
            "moe.topk_groups",
            self.topk_groups,
            f"groups of {self.group_size} experts hold fewer than moe.top_k={self.top_k}",
        )

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.num_experts // self.n_groups
