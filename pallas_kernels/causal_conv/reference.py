"""The causal convolution token by token, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv.activation import activate

REASON = "the oracle of the tests: one token at a time"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, weight, bias, *, segment_ids, initial_state, num_segments, activation):
    """``weight`` [k, D], or [B, T, k, D] where every token has a kernel of its own."""
    B, T, D = x.shape
    k, n = weight.shape[-2], num_segments or 1
    kernels = jnp.broadcast_to(weight.astype(jnp.float32), (B, T, k, D))
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    if initial_state is None:
        initial_state = jnp.zeros((B, n, k - 1, D), x.dtype)
    states, rows = initial_state.astype(jnp.float32), jnp.arange(B)

    def step(carry, token):
        window, last, states = carry
        u, kernel, s = token
        live = s > 0
        # Without states to keep, n is not known: every document then starts from the zeros of the first.
        index = jnp.clip(s - 1, 0, n - 1)
        opening = initial_state.astype(jnp.float32)[rows, index]
        window = jnp.where((live & (s != last))[:, None, None], opening, window)
        taps = jnp.concatenate([window, jnp.where(live[:, None], u, 0)[:, None]], axis=1)
        y = jnp.sum(taps * jnp.where(live[:, None, None], kernel, 0), axis=1)
        window = jnp.where(live[:, None, None], taps[:, 1:], window)
        states = states.at[rows, index].set(jnp.where(live[:, None, None], window, states[rows, index]))
        return (window, jnp.where(live, s, last), states), y

    start = (jnp.zeros((B, k - 1, D)), jnp.zeros(B, ids.dtype), states)
    tokens = (x.astype(jnp.float32).swapaxes(0, 1), kernels.swapaxes(0, 1), ids.T)
    (_, _, states), y = jax.lax.scan(step, start, tokens)
    y = y.swapaxes(0, 1) + (0 if bias is None else bias.astype(jnp.float32))
    y = activate(y, activation)
    return y.astype(x.dtype), None if num_segments is None else states.astype(initial_state.dtype)
