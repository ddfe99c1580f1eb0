"""The convolution with a kernel per token as k shifted products; no window of inputs is ever unfolded."""

import jax.numpy as jnp

from pallas_kernels.causal_conv.activation import activate
from pallas_kernels.causal_conv.xla import open_documents, shifted_sum
from pallas_kernels.segments import extents, final_windows

REASON = "k shifted products fused by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, kernels, *, segment_ids, initial_state, num_segments, activation):
    B, T, D = x.shape
    k, n = kernels.shape[2], num_segments
    if segment_ids is not None:
        live = (segment_ids > 0)[..., None]
        x, kernels = jnp.where(live, x, 0), jnp.where(live[..., None], kernels, 0)
    if n is not None and initial_state is None:
        initial_state = jnp.zeros((B, n, k - 1, D), x.dtype)
    state = None
    if n == 1 and (segment_ids is None or T == 1):
        # One document from the first token on, or a decode step: what came before stands before.
        dtype = jnp.promote_types(initial_state.dtype, x.dtype)
        padded = jnp.concatenate([initial_state[:, 0].astype(dtype), x.astype(dtype)], axis=1)
        y = shifted_sum(padded, kernels, None, None, T)
        state = padded[:, T:].astype(initial_state.dtype)
        if segment_ids is not None:
            state = jnp.where(segment_ids[:, :, None] > 0, state, initial_state[:, 0])
        state = state[:, None]
    else:
        padded = jnp.pad(x, ((0, 0), (k - 1, 0), (0, 0)))
        y = shifted_sum(padded, kernels, None, segment_ids, T)
        if n is not None:
            assert segment_ids is not None
            first, length = extents(segment_ids, n)
            y = open_documents(y, kernels, segment_ids, initial_state, first)
            state = final_windows(x, initial_state, first, length)
    return activate(y, activation).astype(x.dtype), state
