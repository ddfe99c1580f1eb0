"""Attention of a few queries over a paged pool of keys and values, whole or selected, plain or quantised."""

from pallas_kernels.paged_attention.api import OpenTail, PagedOutput, paged_attention
from pallas_kernels.paged_attention.page_scores import page_scores
from pallas_kernels.paged_attention.quantized import QuantizedPages, dequantize_pages, quantize_pages
from pallas_kernels.paged_attention.selection import translate, window_mask

__all__ = [
    "OpenTail",
    "PagedOutput",
    "QuantizedPages",
    "dequantize_pages",
    "page_scores",
    "paged_attention",
    "quantize_pages",
    "translate",
    "window_mask",
]
