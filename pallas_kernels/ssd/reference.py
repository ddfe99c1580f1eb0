"""The SSD recurrence token by token, in float32."""

import jax
import jax.numpy as jnp

REASON = "the oracle of the tests: one token at a time"


def supports(*_args, operand_dtype=None, **_options) -> str | None:
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.float32:
        return f"it computes in float32, not with operand_dtype={jnp.dtype(operand_dtype).name}"
    return None


def run(x, dt, A, B, C, D, *, segment_ids, initial_state, num_segments, open_ends, chunk_size, operand_dtype):
    del chunk_size, operand_dtype
    rows, T, H, P = x.shape
    N, n = B.shape[3], num_segments or 1
    ids = jnp.ones((rows, T), jnp.int32) if segment_ids is None else segment_ids
    if initial_state is None:
        initial_state = jnp.zeros((rows, n, H, P, N))
    initial_state = initial_state.astype(jnp.float32)
    b = jnp.arange(rows)

    def step(carry, token):
        S, last, states = carry
        s, x, dt, B, C = token
        live = s > 0
        # Without states to keep, n is not known: every document then starts from the zeros of the first.
        index = jnp.clip(s - 1, 0, n - 1)
        opening = initial_state[b, index]
        opening = jnp.where((s > 1)[:, None, None, None], 0, opening) if open_ends else opening
        S = jnp.where((live & (s != last))[:, None, None, None], opening, S)
        x, dt, B, C = (jnp.where(live.reshape(-1, *[1] * (v.ndim - 1)), v, 0) for v in (x, dt, B, C))
        B, C = (jnp.repeat(v, H // v.shape[1], axis=1) for v in (B, C))
        S = jnp.exp(dt * A)[..., None, None] * S + (dt[..., None] * x)[..., None] * B[:, :, None, :]
        y = jnp.einsum("bhpn,bhn->bhp", S, C, precision="highest")
        y = y if D is None else y + D[:, None] * x
        states = states.at[b, index].set(jnp.where(live[:, None, None, None], S, states[b, index]))
        return (S, jnp.where(live, s, last), states), y

    tokens = (ids.T, *(v.astype(jnp.float32).swapaxes(0, 1) for v in (x, dt, B, C)))
    start = (jnp.zeros((rows, H, P, N)), jnp.zeros(rows, ids.dtype), initial_state)
    (_, _, states), y = jax.lax.scan(step, start, tokens)
    return y.swapaxes(0, 1).astype(x.dtype), None if num_segments is None else states
