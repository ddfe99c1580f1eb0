"""The convolution with a kernel per token on Hopper GPUs: the kernels of the static one, which read its taps beside each token."""

from functools import partial
from typing import Any

import jax

from pallas_kernels.causal_conv.mosaic_backward import backward
from pallas_kernels.causal_conv.mosaic_forward import forward
from pallas_kernels.causal_conv.mosaic_gpu import final_states, refusal_of_rows, state_gradient
from pallas_kernels.causal_conv.mosaic_rows import Operands
from pallas_kernels.causal_conv.tiles import Tiles
from pallas_kernels.tiles import tiles

REASON = "one read of the inputs and of the kernels, one write, documents and states told apart in the kernel"
BESIDE = "the final states, gathered"


def supports(x, kernels, **_options) -> str | None:
    # More taps in float32 would not fit into shared memory in backward.
    return refusal_of_rows(x, kernels.shape[2], 6)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _convolve(given: Operands, activation):
    own = tiles("dynamic_conv", "forward", Tiles(rows=16))
    return forward(given, activation=activation, tiles=own, name="dynamic_conv_forward")


def _convolve_fwd(given: Operands, activation):
    return _convolve(given, activation), given


def _convolve_bwd(activation, given: Operands, dy):
    own = tiles("dynamic_conv", "backward", Tiles(rows=16))
    found = backward(given, dy, activation=activation, tiles=own, name="dynamic_conv_backward")
    return (Operands(found.x, found.weight, None, None, state_gradient(found.state, given)),)


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def run(x, kernels, *, segment_ids, initial_state, num_segments, activation):
    y: Any = _convolve(Operands(x, kernels, None, segment_ids, initial_state), activation)
    if num_segments is None:
        return y, None
    return y, final_states(x, segment_ids, initial_state, num_segments, kernels.shape[2] - 1)
