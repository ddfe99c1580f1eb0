"""The gated delta rule token by token, in float32, or in float64 where the inputs are."""

import jax
import jax.numpy as jnp

REASON = "the oracle of the tests: one token at a time"


def supports(*_args, operand_dtype=None, **_options) -> str | None:
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.float32:
        return f"it computes in float32, not with operand_dtype={jnp.dtype(operand_dtype).name}"
    return None


def run(q, k, v, g, beta, *, segment_ids, initial_state, num_segments, open_ends, chunk_size, operand_dtype):
    del chunk_size, operand_dtype
    rows, T, H, dk = q.shape
    Hv, dv = v.shape[2:]
    n = num_segments or 1
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    ids = jnp.ones((rows, T), jnp.int32) if segment_ids is None else segment_ids
    if initial_state is None:
        initial_state = jnp.zeros((rows, n, Hv, dk, dv))
    initial_state = initial_state.astype(dtype)
    b = jnp.arange(rows)

    def step(carry, token):
        S, last, states = carry
        s, *values = token
        live = s > 0
        # Without states to keep, n is not known: every document then starts from the zeros of the first.
        index = jnp.clip(s - 1, 0, n - 1)
        opening = initial_state[b, index]
        opening = jnp.where((s > 1)[:, None, None, None], 0, opening) if open_ends else opening
        S = jnp.where((live & (s != last))[:, None, None, None], opening, S)
        q, k, v, g, beta = (jnp.where(live.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in values)
        q, k = (jnp.repeat(x, Hv // H, axis=1) for x in (q, k))
        S = jnp.exp(g)[..., None, None] * S
        write = beta[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", S, k, precision="highest"))
        S = S + k[..., None] * write[..., None, :]
        o = jnp.einsum("bhkv,bhk->bhv", S, q, precision="highest")
        states = states.at[b, index].set(jnp.where(live[:, None, None, None], S, states[b, index]))
        return (S, jnp.where(live, s, last), states), o

    tokens = (ids.T, *(x.astype(dtype).swapaxes(0, 1) for x in (q, k, v, g, beta)))
    start = (jnp.zeros((rows, Hv, dk, dv), dtype), jnp.zeros(rows, ids.dtype), initial_state)
    (_, _, states), o = jax.lax.scan(step, start, tokens)
    return o.swapaxes(0, 1).astype(v.dtype), None if num_segments is None else states
