"""The convolution with a kernel per token, token by token, in float32."""

import jax
import jax.numpy as jnp

REASON = "the oracle of the tests: one token at a time"


def supports(*_args, **_options) -> str | None:
    return None


def run(x, kernels, *, segment_ids, initial_state, num_segments, activation):
    B, T, D = x.shape
    k, n = kernels.shape[2], num_segments or 1
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
    tokens = (x.astype(jnp.float32).swapaxes(0, 1), kernels.astype(jnp.float32).swapaxes(0, 1), ids.T)
    (_, _, states), y = jax.lax.scan(step, start, tokens)
    y = y.swapaxes(0, 1)
    y = jax.nn.silu(y) if activation == "silu" else y
    return y.astype(x.dtype), None if num_segments is None else states.astype(initial_state.dtype)
