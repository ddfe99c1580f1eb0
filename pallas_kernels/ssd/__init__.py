"""State-space duality (Mamba-2): the chunked selective scan over packed documents."""

from pallas_kernels.ssd.api import ssd

__all__ = ["ssd"]
