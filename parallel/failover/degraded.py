"""Cheaper backward passes for who does two workers' jobs (MeCeFO, arXiv 2510.16415); forward passes stay as they are.

Layout: rows are tokens and y = x W with W [in, out], where the paper has y = W x. Its right singular vectors of W are the
left ones here.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.precision import contract

# Below this many rows W is decomposed as it is: that costs milliseconds, and needs no bases of before.
SMALL = 256
# Passes over W that begin at any basis, and at the one of the last refresh.
COLD, WARM = 8, 2


def skip(h: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """``h + y``, in whose gradient the branch y is a constant: nothing of it is kept or differentiated."""
    return h + jax.lax.stop_gradient(y)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _low_rank(x, w, v1, operand_dtype, out_dtype):
    return contract("bti,io->bto", x, w, operand_dtype=operand_dtype, out_dtype=out_dtype)


def _low_rank_fwd(x, w, v1, operand_dtype, out_dtype):
    return _low_rank(x, w, v1, operand_dtype, out_dtype), (x, w, v1)


def _low_rank_bwd(operand_dtype, out_dtype, residuals, g):
    x, w, v1 = residuals
    product = partial(contract, operand_dtype=operand_dtype)
    dx = product("bto,io->bti", g, w, out_dtype=x.dtype)
    small = product("btr,bto->ro", product("bti,ir->btr", x, v1, out_dtype=x.dtype), g)
    # As many rows as W has, of few numbers each: exact, for it is the step itself.
    dw = contract("ir,ro->io", v1.astype(jnp.float32), small)
    return dx, dw.astype(w.dtype), None


_low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


def low_rank_matmul(
    x: Float[Array, "B T i"],
    w: Float[Array, "i o"],
    v1: Float[Array, "i r"],
    *,
    operand_dtype: DTypeLike | None = None,
    out_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B T o"]:
    """``x w``, whose weight gradient is ``V1 ((x V1)^T g)``: that of ``x w`` projected onto the columns of V1.

    2 b r (i + o) + 2 i r o operations for b tokens instead of 2 b i o. The gradient of x is exact, that of V1 zero.

    Args:
        x: activations.
        w: weights.
        v1: orthonormal columns (:func:`refresh`).
        operand_dtype: dtype to which operands and cotangents of products over tokens are rounded; None keeps theirs.
        out_dtype: of the result.

    Raises:
        ValueError: r is above i.
    """
    _check_rank(w, v1)
    dtype = None if operand_dtype is None else jnp.dtype(operand_dtype)
    return _low_rank(x, w, v1, dtype, jnp.dtype(out_dtype))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _low_rank_grouped(x, w, v1, sizes, operand_dtype, implementation):
    return grouped_matmul(x, w, sizes, operand_dtype=operand_dtype, implementation=implementation)


def _low_rank_grouped_fwd(x, w, v1, sizes, operand_dtype, implementation):
    y = _low_rank_grouped(x, w, v1, sizes, operand_dtype, implementation)
    return y, (x, w, v1, sizes)


def _low_rank_grouped_bwd(operand_dtype, implementation, residuals, g):
    x, w, v1, sizes = residuals
    product = partial(grouped_matmul, sizes=sizes, operand_dtype=operand_dtype, implementation=implementation)
    (dx,) = jax.vjp(lambda x: product(x, w), x)[1](g)
    # Linear in its weights: the gradient at zero is the gradient.
    zeros = jnp.zeros((len(w), v1.shape[2], w.shape[2]), jnp.float32)
    (small,) = jax.vjp(partial(product, product(x, v1.astype(x.dtype))), zeros)[1](g)
    dw = contract("eir,ero->eio", v1.astype(jnp.float32), small)
    return dx, dw.astype(w.dtype), None, None


_low_rank_grouped.defvjp(_low_rank_grouped_fwd, _low_rank_grouped_bwd)


def low_rank_grouped_matmul(
    x: Float[Array, "M i"],
    w: Float[Array, "E i o"],
    v1: Float[Array, "E i r"],
    sizes: Int[Array, " E"],
    *,
    operand_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "M o"]:
    """:func:`low_rank_matmul` of every expert and its rows (:func:`pallas_kernels.grouped_matmul.grouped_matmul`).

    An expert that has r rows or fewer would be cheaper, and exact, by the ordinary rule; how many those are is not known
    when this is compiled, so that there is one rule for all.

    Raises:
        ValueError: r is above i.
    """
    _check_rank(w, v1)
    dtype = None if operand_dtype is None else jnp.dtype(operand_dtype)
    return _low_rank_grouped(x, w, v1, sizes, dtype, implementation)


def refresh(w: Float[Array, "*n i o"], rank: int, previous: Any = None) -> Float[Array, "*n i r"]:
    """Orthonormal columns that span the ``rank`` first left singular vectors of each W, float32 whatever W is.

    Small matrices are decomposed. Larger ones take subspace iteration, V <- qr(W W^T V), from the basis of before: W
    moves little between two refreshes, so a few passes do.

    Args:
        w: weights, perhaps of several experts or layers.
        rank: r, at most i.
        previous: the last result; None: there is none.

    Raises:
        ValueError: ``rank`` is not in 1 ... i.
    """
    inputs, outputs = w.shape[-2:]
    if not 1 <= rank <= inputs:
        raise ValueError(f"rank={rank}: must be 1 to {inputs}, the rows of w {w.shape}")
    w = w.astype(jnp.float32)
    if inputs <= SMALL or rank > outputs:
        return jnp.linalg.svd(w, full_matrices=rank > outputs)[0][..., :rank]
    passes = COLD if previous is None else WARM
    if previous is None:
        previous = jax.random.normal(jax.random.key(0), (*w.shape[:-1], rank))
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def iterate(_: Array, v: Array) -> Array:
        v = product("...io,...or->...ir", w, product("...io,...ir->...or", w, v))
        return jnp.linalg.qr(v)[0]

    return jax.lax.fori_loop(0, passes, iterate, previous)


def _check_rank(w: Array, v1: Array) -> None:
    if v1.shape[:-1] != w.shape[:-1] or v1.shape[-1] > w.shape[-2]:
        raise ValueError(
            f"v1: shape {v1.shape}; must be {(*w.shape[:-1], 'r')} with r at most {w.shape[-2]}, for w {w.shape}"
        )
