"""The gated delta rule: chunked linear attention with erasing writes, over packed documents."""

from pallas_kernels.gated_delta.api import gated_delta

__all__ = ["gated_delta"]
