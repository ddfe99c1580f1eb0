"""The gated delta rule along every path of a tree of tokens, and its commit."""

from pallas_kernels.gated_delta.window.api import Factors, gated_delta_commit, gated_delta_window

__all__ = ["Factors", "gated_delta_commit", "gated_delta_window"]
