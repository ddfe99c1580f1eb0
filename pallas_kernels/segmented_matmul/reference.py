"""The definition: each row's own copy of its adapter's factors."""

import jax.numpy as jnp

REASON = "the oracle of the tests: the factors gathered once per row"


def supports(*_args, operand_dtype=None, **_options) -> str | None:
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.float32:
        return f"it computes in float32, not with operand_dtype={jnp.dtype(operand_dtype).name}"
    return None


def run(x, a, b, scaling, slots, *, operand_dtype):
    del operand_dtype
    known = (slots >= 0) & (slots < len(a))
    some = known & (slots > 0)
    rows = [x, *(pool[jnp.where(some, slots, 0)] for pool in (a, b, scaling))]
    # Masked before they are multiplied: zero times the NaN of slot 0 would be NaN, in values and gradients.
    mine = (jnp.where(some.reshape(-1, *[1] * (w.ndim - 1)), w, 0).astype(jnp.float32) for w in rows)
    y = jnp.einsum("mk,mkr,mrn,m->mn", *mine, precision="highest")
    return jnp.where(known[:, None], y, jnp.nan).astype(x.dtype)
