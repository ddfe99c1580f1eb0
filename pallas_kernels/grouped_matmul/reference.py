"""The grouped product as a dense one: every row with every expert, of which one is kept."""

import jax.numpy as jnp

REASON = "the oracle of the tests: every row times every expert"


def supports(*_args, operand_dtype=None, **_options) -> str | None:
    if operand_dtype is not None and jnp.dtype(operand_dtype) != jnp.float32:
        return f"it computes in float32, not with operand_dtype={jnp.dtype(operand_dtype).name}"
    return None


def run(x, w, sizes, *, operand_dtype):
    del operand_dtype
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])[:, None]
    member = (row >= ends - sizes) & (row < ends)
    kept = jnp.where(row < ends[-1], x.astype(jnp.float32), 0)
    y = jnp.einsum(
        "mk,ekn,me->mn", kept, w.astype(jnp.float32), member.astype(jnp.float32), precision="highest"
    )
    return y.astype(x.dtype)
