"""The SSD recurrence along every path of a tree of tokens, and its commit."""

from pallas_kernels.ssd.window.api import Factors, ssd_commit, ssd_window

__all__ = ["Factors", "ssd_commit", "ssd_window"]
