"""One token of the causal convolution for each of some slots of a pool, whose windows it moves on in place."""

from pallas_kernels.causal_conv.step.api import causal_conv_step

__all__ = ["causal_conv_step"]
