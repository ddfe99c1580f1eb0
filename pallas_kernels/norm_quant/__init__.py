"""RMSNorm whose result is rounded to 8 bits at once, for several products to share."""

from pallas_kernels.norm_quant.api import norm_quant

__all__ = ["norm_quant"]
