"""Two-operand contractions whose operands, and whose cotangents, are rounded to a chosen dtype.

On CPUs with AMX and on every GPU a bfloat16 product with float32 accumulation is several times faster than a
float32 one, but autodiff of ``dot(a.astype(bf16), b.astype(bf16), preferred_element_type=f32)`` multiplies a
float32 cotangent with a bfloat16 operand and falls off the fast path. ``contract`` rounds the cotangent too.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.materialise import materialise


def _einsum(spec: str, a, b, operand_dtype, out_dtype):
    if operand_dtype is not None:
        a, b = a.astype(operand_dtype), b.astype(operand_dtype)
    # float32 operands keep full precision on devices that would otherwise round them (TF32, bf16 passes).
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32).astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _contract(spec, a, b, operand_dtype, out_dtype):
    return _einsum(spec, a, b, operand_dtype, out_dtype)


def _contract_fwd(spec, a, b, operand_dtype, out_dtype):
    kept = (a, b) if operand_dtype is None else (a.astype(operand_dtype), b.astype(operand_dtype))
    # The activation is read here and, transposed, in backward; the weight is a parameter and in memory anyway.
    kept = (materialise(kept[0]), kept[1])
    # Zero-size arrays remember the primal dtypes, so that only the rounded operands are kept for backward.
    return _einsum(spec, *kept, None, out_dtype), (*kept, jnp.zeros((0,), a.dtype), jnp.zeros((0,), b.dtype))


def _contract_bwd(spec, operand_dtype, out_dtype, residuals, g):
    a, b, a_like, b_like = residuals
    inputs, out = spec.split("->")
    ia, ib = inputs.split(",")
    g = materialise(g if operand_dtype is None else g.astype(operand_dtype))
    da = _einsum(f"{out},{ib}->{ia}", g, b, operand_dtype, a_like.dtype)
    db = _einsum(f"{ia},{out}->{ib}", a, g, operand_dtype, b_like.dtype)
    return da, db


_contract.defvjp(_contract_fwd, _contract_bwd)


def contract(
    spec: str,
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    *,
    operand_dtype: DTypeLike | None = None,
    out_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "..."]:
    """``jnp.einsum(spec, a, b)`` accumulated in float32, forward and backward.

    Args:
        spec: explicit two-operand einsum without ellipsis; each letter stands in at least two of the three terms.
        a: left operand.
        b: right operand.
        operand_dtype: dtype to which operands and cotangents are rounded before each product; None keeps theirs.
        out_dtype: dtype of the result.

    Raises:
        ValueError: a letter occurs in one term only (its gradient would need a broadcast), or the spec is implicit.
    """
    inputs, arrow, out = spec.partition("->")
    terms = [*inputs.split(","), out]
    if not arrow or len(terms) != 3 or "." in spec:
        raise ValueError(f"spec={spec!r}: expected an explicit two-operand einsum such as 'bti,io->bto'")
    for letter in set("".join(terms)):
        if sum(letter in term for term in terms) < 2:
            raise ValueError(
                f"spec={spec!r}: letter {letter!r} must stand in at least two of the three terms"
            )
    dtype = None if operand_dtype is None else jnp.dtype(operand_dtype)
    return _contract(spec, a, b, dtype, jnp.dtype(out_dtype))
