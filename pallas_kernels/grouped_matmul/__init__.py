"""Matrix products in which each row has its own expert's weights, and the permutation that sorts rows by expert."""

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.permute import Plan, from_experts, plan, to_experts

__all__ = ["Plan", "from_experts", "grouped_matmul", "plan", "to_experts"]
