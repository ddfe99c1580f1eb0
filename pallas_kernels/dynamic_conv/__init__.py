"""Depthwise causal convolution whose kernels are inputs: one per token and channel (Jet-Nemotron's JetBlock)."""

from pallas_kernels.dynamic_conv.api import dynamic_conv

__all__ = ["dynamic_conv"]
