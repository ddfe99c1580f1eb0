"""The causal convolution as k shifted products, corrected by the few rows that look into an initial state."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv.activation import activate
from pallas_kernels.materialise import hold
from pallas_kernels.segments import extents, final_windows

REASON = "k shifted products fused by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def shifted_sum(padded, weight, bias, ids, T):
    """bias + sum_j weight[..., j, :] padded[:, j:j+T], each tap kept within its document; float32.

    ``weight`` [k, D], or [B, T, k, D] where every token has a kernel of its own.
    """
    k = weight.shape[-2]
    y = jnp.zeros(weight.shape[-1:]) if bias is None else bias
    past = None if ids is None else jnp.pad(ids, ((0, 0), (k - 1, 0)))
    for j in range(k):
        tap = weight[..., j, :].astype(jnp.float32) * padded[:, j : j + T].astype(jnp.float32)
        if past is not None and j < k - 1:
            tap = jnp.where((past[:, j : j + T] == ids)[..., None], tap, 0)
        y = y + tap
    return y


def _taps(x, same):
    """What each tap reads, oldest first: x [B, T, D] shifted, where ``same`` [B, T, k] says it is to be read."""
    k, T = same.shape[2], x.shape[1]
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (k - 1, 0), (0, 0)))
    return [padded[:, j : j + T] * same[:, :, j, None] for j in range(k)]


def _before_activation(x, weight, bias, same):
    y = jnp.zeros(weight.shape[1:]) if bias is None else bias
    return sum((w * tap for w, tap in zip(weight, _taps(x, same), strict=True)), start=y)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _packed(x, weight, bias, same, activation):
    """Training: no states. float32 output."""
    return activate(_before_activation(x, weight, bias, same), activation)


def _packed_fwd(x, weight, bias, same, activation):
    return _packed(x, weight, bias, same, activation), (x, weight, bias, same)


def _packed_bwd(activation, residuals, dy):
    """Autodiff would keep every shifted product, and pad each one's gradient by itself."""
    x, weight, bias, same = residuals
    if activation == "silu":
        y = _before_activation(x, weight, bias, same)
        s = jax.nn.sigmoid(y)
        dy = hold(dy * s * (1 + y * (1 - s)))
    k, T = same.shape[2], x.shape[1]
    dweight = jnp.stack([jnp.sum(dy * tap, axis=(0, 1)) for tap in _taps(x, same)])
    later, reads = (jnp.pad(v, ((0, 0), (0, k - 1), (0, 0))) for v in (dy, same))
    dx = jnp.zeros(x.shape)
    for j in range(k):
        since = slice(k - 1 - j, k - 1 - j + T)
        dx = dx + weight[j] * (later[:, since] * reads[:, since, j, None])
    dbias = None if bias is None else jnp.sum(dy, axis=(0, 1))
    return dx.astype(x.dtype), dweight, dbias, None


_packed.defvjp(_packed_fwd, _packed_bwd)


def one_token(x, weight, bias, ids, initial_state, activation):
    """Decode: the window is the initial state of the only document."""
    dtype = initial_state.dtype
    taps = jnp.concatenate([initial_state[:, 0], x.astype(dtype)], axis=1)
    y = jnp.sum(taps[:, :-1] * weight[:-1], axis=1, keepdims=True) + x * weight[-1]
    y = y if bias is None else y + bias
    state = taps[:, 1:]
    if ids is not None:
        live = (ids > 0)[:, :, None]
        y = jnp.where(live, y, 0)
        state = jnp.where(live, state, initial_state[:, 0])
    return activate(y, activation), state[:, None]


def open_documents(y, weight, ids, initial_state, first):
    """Add what the first k-1 tokens of each document draw from its initial state: n (k-1) rows; weight as above."""
    B, T, D = y.shape
    n, reach = initial_state.shape[1:3]
    row = first[:, :, None] + jnp.arange(reach)
    owner = jnp.take_along_axis(ids, jnp.minimum(row, T - 1).reshape(B, -1), axis=1).reshape(row.shape)
    inside = (row < T) & (owner == jnp.arange(1, n + 1)[:, None])
    # Row T does not exist: the scatter drops what an absent or shorter document would have written.
    row = jnp.where(inside, row, T).reshape(B, -1)
    if weight.ndim == 2:
        used = jnp.broadcast_to(weight, (1, 1, reach, *weight.shape))
    else:
        used = jnp.take_along_axis(weight, jnp.minimum(row, T - 1)[:, :, None, None], axis=1)
        used = used.reshape(B, n, reach, -1, D)
    used, state = used.astype(jnp.float32), initial_state.astype(jnp.float32)
    drawn = [sum(used[:, :, i, j] * state[:, :, i + j] for j in range(reach - i)) for i in range(reach)]
    add = jnp.stack(drawn, axis=2).reshape(B, n * reach, D)
    return y.at[jnp.arange(B)[:, None], row].add(add, mode="drop")


def run(x, weight, bias, *, segment_ids, initial_state, num_segments, activation):
    B, T, D = x.shape
    k, n = weight.shape[0], num_segments
    weight = weight.astype(jnp.float32)
    bias = None if bias is None else bias.astype(jnp.float32)
    if n is not None and initial_state is None and (T == 1 or segment_ids is not None):
        initial_state = jnp.zeros((B, n, k - 1, D), x.dtype)
    if T == 1 and n == 1 and k > 1:
        y, state = one_token(x, weight, bias, segment_ids, initial_state, activation)
        return y.astype(x.dtype), state
    if segment_ids is None:
        before = jnp.zeros((B, k - 1, D), x.dtype) if initial_state is None else initial_state[:, 0]
        padded = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        state = None
        if n is not None:
            state = padded[:, T:][:, None].astype(before.dtype)
        return activate(shifted_sum(padded, weight, bias, None, T), activation).astype(x.dtype), state
    if n is None:
        past = jnp.pad(segment_ids, ((0, 0), (k - 1, 0)))
        same = jnp.stack([past[:, j : j + T] == segment_ids for j in range(k)], axis=2)
        same = hold((same & (segment_ids > 0)[..., None]).astype(jnp.float32))
        y: Any = _packed(x, weight, bias, same, activation)
        return y.astype(x.dtype), None
    x = jnp.where((segment_ids > 0)[..., None], x, 0)
    padded = jnp.pad(x, ((0, 0), (k - 1, 0), (0, 0)))
    y, state = shifted_sum(padded, weight, bias, segment_ids, T), initial_state
    if k > 1:
        assert initial_state is not None
        first, length = extents(segment_ids, n)
        y = open_documents(y, weight, segment_ids, initial_state, first)
        assert initial_state is not None
        state = final_windows(x, initial_state, first, length)
    return activate(y, activation).astype(x.dtype), state
