"""Grouped-query attention whose causality is (document, position), never row index."""

from pallas_kernels.attention.api import attention, attention_backward
from pallas_kernels.attention.merge import merge

__all__ = ["attention", "attention_backward", "merge"]
