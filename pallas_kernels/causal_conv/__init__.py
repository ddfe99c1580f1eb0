"""Depthwise causal convolution over packed documents, with the raw inputs it keeps between calls."""

from pallas_kernels.causal_conv.api import causal_conv

__all__ = ["causal_conv"]
