"""The causal convolution on Hopper GPUs through Mosaic: a window of inputs that slides down the tokens in registers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv.mosaic_backward import backward
from pallas_kernels.causal_conv.mosaic_forward import forward
from pallas_kernels.causal_conv.mosaic_rows import Operands
from pallas_kernels.causal_conv.tiles import LANES, Tiles
from pallas_kernels.segments import extents, final_windows
from pallas_kernels.tiles import tiles

REASON = "one read of the inputs and one write, documents and states told apart in the kernel"
BESIDE = "the final states, gathered; in backward the sums over blocks"


def refusal(x, k: int, most: int) -> str | None:
    """Why a kernel of at most ``most`` taps does not take inputs like x [..., D] with k taps; None where it does."""
    if x.shape[-1] % LANES:
        return f"it takes channels in multiples of {LANES}, not {x.shape[-1]}"
    if not 2 <= k <= most:
        return f"it takes 2 to {most} taps, not {k}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"inputs are bfloat16 or float32, not {x.dtype.name}"
    return None


def refusal_of_rows(x, k: int, most: int) -> str | None:
    """:func:`refusal` of rows of tokens x [B, T, D]."""
    if x.shape[1] == 1:
        return "single tokens are one fusion of XLA, which reads and writes no more than a kernel would"
    return refusal(x, k, most)


def supports(x, weight, _bias, **_options) -> str | None:
    return refusal_of_rows(x, weight.shape[0], 8)


def final_states(x, segment_ids, initial_state, n: int, reach: int):
    """The last inputs of each document: the few rows that XLA gathers beside the kernel."""
    B, T, D = x.shape
    if initial_state is None:
        initial_state = jnp.zeros((B, n, reach, D), x.dtype)
    if segment_ids is None:
        first, length = jnp.zeros((B, 1), jnp.int32), jnp.full((B, 1), T, jnp.int32)
    else:
        first, length = extents(segment_ids, n)
    return final_windows(x, initial_state, first, length)


def state_gradient(found, given: Operands):
    """Of what stands before each document, 0 where it does not occur: the kernel writes nothing there."""
    if given.state is None:
        return None
    if given.ids is not None:
        _, length = extents(given.ids, given.state.shape[1])
        found = jnp.where((length > 0)[:, :, None, None], found, 0)
    return found.astype(given.state.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _convolve(given: Operands, activation):
    own = tiles("causal_conv", "forward", Tiles())
    return forward(given, activation=activation, tiles=own, name="causal_conv_forward")


def _convolve_fwd(given: Operands, activation):
    return _convolve(given, activation), given


def _convolve_bwd(activation, given: Operands, dy):
    own = tiles("causal_conv", "backward", Tiles(rows=32))
    found = backward(given, dy, activation=activation, tiles=own, name="causal_conv_backward")
    dweight = jnp.sum(found.weight, axis=(0, 1)).astype(given.weight.dtype)
    dbias = None
    if given.bias is not None and found.bias is not None:
        dbias = jnp.sum(found.bias, axis=(0, 1)).astype(given.bias.dtype)
    return (Operands(found.x, dweight, dbias, None, state_gradient(found.state, given)),)


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def run(x, weight, bias, *, segment_ids, initial_state, num_segments, activation):
    y: Any = _convolve(Operands(x, weight, bias, segment_ids, initial_state), activation)
    if num_segments is None:
        return y, None
    return y, final_states(x, segment_ids, initial_state, num_segments, weight.shape[0] - 1)
