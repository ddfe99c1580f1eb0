"""The causal convolution along every path of a tree of tokens, and its commit."""

from pallas_kernels.causal_conv.window.api import causal_conv_commit, causal_conv_window

__all__ = ["causal_conv_commit", "causal_conv_window"]
