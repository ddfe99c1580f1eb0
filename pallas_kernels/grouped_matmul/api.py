"""Public entry of the grouped matrix product."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import (
    require,
    require_floats,
    require_integers,
    require_operand_dtype,
    require_shape,
)


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E K N"],
    sizes: Int[Array, "E"],
    *,
    operand_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "M N"]:
    """``y[m] = x[m] @ w[e]`` for the rows of expert e, which stand together: dropless and exact, with static shapes.

    Source: MegaBlocks' dropless experts (arXiv 2211.15841); semantics of ``jax.lax.ragged_dot``.

    Args:
        x: rows sorted by expert: the first ``sizes[0]`` are expert 0's, the next ``sizes[1]`` expert 1's, ...
        w: weights of every expert.
        sizes: rows of each expert; their sum is at most M. What stands in x past them is never read (NaN included).
        operand_dtype: dtype to which operands and cotangents are rounded (sums are float32); None keeps that of x.
        implementation: "auto", "mosaic_gpu", "xla" or "reference".

    Returns:
        y in the dtype of x; rows past the last expert's are zero, and so are their gradients.

    Raises:
        ValueError: a shape, a dtype, ``operand_dtype`` or ``implementation`` is not as above.
    """
    require(x.ndim == 2, "x.shape", x.shape, "two dimensions [M, K]")
    require(w.ndim == 3, "w.shape", w.shape, "three dimensions [E, K, N]")
    require(x.shape[1] == w.shape[1], "x.shape", x.shape, f"K (second) to be {w.shape[1]}, as in w [E, K, N]")
    require(w.shape[0] >= 1, "w.shape", w.shape, "at least one expert [E, K, N]")
    require_shape("sizes", sizes, (w.shape[0],), "E")
    require_floats(x=x, w=w)
    require_integers(sizes=sizes)
    require_operand_dtype(operand_dtype)
    options = {"operand_dtype": operand_dtype}
    module = dispatch.choose("grouped_matmul", implementation, x, w, sizes, **options)
    return module.run(x, w, sizes, **options)
