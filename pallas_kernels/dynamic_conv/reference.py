"""The convolution with a kernel per token, token by token, in float32."""

from pallas_kernels.causal_conv import reference

REASON = reference.REASON
supports = reference.supports


def run(x, kernels, **options):
    return reference.run(x, kernels, None, **options)
