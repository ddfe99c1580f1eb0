"""Upper bounds of what a page's keys can score, for choosing pages before reading them."""

from pallas_kernels.paged_attention.page_scores.api import page_scores

__all__ = ["page_scores"]
