"""Public entry of the product of rows with the adapters of their slots."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import require, require_operand_dtype, require_shape


def segmented_matmul(
    x: Float[Array, "M K"],
    a: Float[Array, "S K r"],
    b: Float[Array, "S r N"],
    scaling: Float[Array, "S"],
    slots: Int[Array, "M"],
    *,
    operand_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "M N"]:
    """``y[m] = scaling[s] * (x[m] @ a[s]) @ b[s]`` with s = slots[m]: what each row's LoRA adapter adds to a linear layer.

    The rows stand in any order; static shapes, so that adapters come and go without a new program. Adapters of a lower
    rank than r are padded with zeros. Differentiable in x, a, b and scaling.

    Source: SMLM of Loquetier (arXiv 2511.00101); LoRA (arXiv 2106.09685).

    Args:
        x: rows.
        a: pool of shrinking factors, slot by slot.
        b: pool of expanding factors.
        scaling: of each slot, alpha / rank (alpha / sqrt(rank) with rsLoRA).
        slots: slot of each row, in [0, S). Slot 0 is no adapter: what its factors hold is never read (NaN included), nor
            are those of slots without rows. A row whose slot is outside gives NaN.
        operand_dtype: dtype to which x, the factors and cotangents are rounded; what stands between the two products is
            float32 in any case, as are sums. None keeps the dtype of x.
        implementation: "auto", "mosaic_gpu", "xla" or "reference".

    Returns:
        y in the dtype of x. Rows of slot 0 are zero, and so are the gradients of their x and of slots without rows.

    Raises:
        ValueError: a shape, a dtype, ``operand_dtype`` or ``implementation`` is not as above.
    """
    require(x.ndim == 2, "x.shape", x.shape, "two dimensions [M, K]; flatten the others")
    require(a.ndim == 3, "a.shape", a.shape, "three dimensions [S, K, r]")
    S, K, r = a.shape
    require(S >= 1, "a.shape", a.shape, "S (first) of at least 1: slot 0 is no adapter, and must be there")
    require(r >= 1, "a.shape", a.shape, "a rank r (last) of at least 1")
    allowed = f"K (second) to be {K}, as in a [S, K, r]; PEFT's lora_A is [r, K]: transpose it"
    require(x.shape[1] == K, "x.shape", x.shape, allowed)
    allowed = f"({S}, {r}, N), as in a [S, K, r]; PEFT's lora_B is [N, r]: transpose it"
    require(b.ndim == 3 and b.shape[:2] == (S, r), "b.shape", b.shape, allowed)
    require_shape("scaling", scaling, (S,), "S")
    require_shape("slots", slots, x.shape[:1], "M")
    allowed = "integers, a slot per row"
    require(jnp.issubdtype(slots.dtype, jnp.integer), "slots.dtype", slots.dtype.name, allowed)
    for name, array in {"x": x, "a": a, "b": b, "scaling": scaling}.items():
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        require(floating, f"{name}.dtype", array.dtype.name, "a floating dtype; dequantise first")
    require_operand_dtype(operand_dtype)
    options = {"operand_dtype": operand_dtype}
    module = dispatch.choose("segmented_matmul", implementation, x, a, b, scaling, slots, **options)
    return module.run(x, a, b, scaling, slots, **options)
