"""Grouped-query attention whose causality is (document, position), never row index."""

from pallas_kernels.attention.api import attention

__all__ = ["attention"]
