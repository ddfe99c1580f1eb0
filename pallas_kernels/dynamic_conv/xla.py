"""The convolution with a kernel per token as k shifted products; no window of inputs is ever unfolded."""

import jax
import jax.numpy as jnp

from pallas_kernels.segments import extents, final_windows

REASON = "k shifted products fused by XLA; no GPU kernel of this op is present"


def supports(*_args, **_options) -> str | None:
    return None


def _shifted_sum(padded, kernels, ids):
    """sum_j kernels[:, :, j] padded[:, j:j+T], each tap kept within its document; float32."""
    T, k = kernels.shape[1:3]
    y = jnp.zeros((), jnp.float32)
    past = None if ids is None else jnp.pad(ids, ((0, 0), (k - 1, 0)))
    for j in range(k):
        tap = kernels[:, :, j].astype(jnp.float32) * padded[:, j : j + T].astype(jnp.float32)
        if past is not None and j < k - 1:
            tap = jnp.where((past[:, j : j + T] == ids)[..., None], tap, 0)
        y = y + tap
    return y


def _open_documents(y, kernels, ids, initial_state, first):
    """Add what the first k-1 tokens of each document draw from its initial state: n (k-1) rows."""
    B, T, D = y.shape
    n, reach = initial_state.shape[1:3]
    row = first[:, :, None] + jnp.arange(reach)
    owner = jnp.take_along_axis(ids, jnp.minimum(row, T - 1).reshape(B, -1), axis=1).reshape(row.shape)
    inside = (row < T) & (owner == jnp.arange(1, n + 1)[:, None])
    # Row T does not exist: the scatter drops what an absent or shorter document would have written.
    row = jnp.where(inside, row, T).reshape(B, -1)
    used = jnp.take_along_axis(kernels, jnp.minimum(row, T - 1)[:, :, None, None], axis=1)
    used = used.reshape(B, n, reach, -1, D).astype(jnp.float32)
    state = initial_state.astype(jnp.float32)
    drawn = [sum(used[:, :, i, j] * state[:, :, i + j] for j in range(reach - i)) for i in range(reach)]
    add = jnp.stack(drawn, axis=2).reshape(B, n * reach, D)
    return y.at[jnp.arange(B)[:, None], row].add(add, mode="drop")


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
        y = _shifted_sum(padded, kernels, None)
        state = padded[:, T:].astype(initial_state.dtype)
        if segment_ids is not None:
            state = jnp.where(segment_ids[:, :, None] > 0, state, initial_state[:, 0])
        state = state[:, None]
    else:
        y = _shifted_sum(jnp.pad(x, ((0, 0), (k - 1, 0), (0, 0))), kernels, segment_ids)
        if n is not None:
            assert segment_ids is not None
            first, length = extents(segment_ids, n)
            y = _open_documents(y, kernels, segment_ids, initial_state, first)
            state = final_windows(x, initial_state, first, length)
    y = jax.nn.silu(y) if activation == "silu" else y
    return y.astype(x.dtype), state
