"""Low-rank products in which each row has its own adapter's two factors: many LoRA adapters over one base."""

from pallas_kernels.segmented_matmul.api import segmented_matmul

__all__ = ["segmented_matmul"]
