"""Public entry of RMSNorm and rounding in one, and its argument checks."""

import math
from numbers import Real

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import require, require_shape
from pallas_kernels.quantized_matmul.codes import EIGHT_BITS, GROUPS, QuantizedRows

_FLOATS = ("bfloat16", "float32")


def norm_quant(
    x: Float[Array, "*rows K"],
    weight: Float[Array, "K"],
    *,
    eps: float = 1e-5,
    residual: Float[Array, "*rows K"] | None = None,
    group: int | None = None,
    clip: float = 1.0,
    code_dtype: DTypeLike = jnp.int8,
    implementation: str = "auto",
) -> tuple[QuantizedRows, Float[Array, "*rows K"] | None]:
    """``quantize_rows(rms_norm(x + residual) * weight)``, read once and written in 8 bits.

    ``u = x + residual`` in the dtype of x; ``y = u / sqrt(mean(u ** 2) + eps) * weight``, in float32 and not rounded to
    the dtype of x; then codes and scales as :func:`pallas_kernels.quantized_matmul.quantize_rows` makes them of y, for
    every projection that reads it. A row that holds NaN has scales of NaN, and so has each group that holds an infinity.

    Equal to the composition in ``reference`` and ``xla``, up to the order in which a row is summed. ``mosaic_gpu`` sums in
    another order and multiplies by the inverse of a scale, so that values within a few units in the last place of a tie may
    get the next code: a code is off by at most one, and at most one in a thousand is; scales are off by 1e-6 of themselves.

    Differentiable by x, weight and residual as what it stands for is: through the new residual and through the scales.
    Codes have no gradient, float8 or not, as in ``quantized_matmul``: whoever trains through them passes y on straight.

    Source: RMSNorm (arXiv 1910.07467); Atom's quantiser of activations, which it fuses with what comes before it
    (arXiv 2310.19102).

    Args:
        x: finite rows, bfloat16 or float32; leading dimensions become the one of the codes.
        weight: of the norm, bfloat16 or float32.
        eps: added to the mean square.
        residual: added before the norm, of the dtype of x.
        group: inputs that share a scale: 32, 64 or 128; None: all of a row's.
        clip: factor of the range, above 0 and at most 1.
        code_dtype: int8, float8_e4m3fn or float8_e5m2.
        implementation: "auto", "mosaic_gpu" (Hopper; K a multiple of 128 up to 16384), "xla" or "reference".

    Returns:
        Rows of M = product of the leading dimensions: codes [M, K] and scales f32[M, K / group], or [M, 1]; and the sum
        u, or None without ``residual``.

    Raises:
        ValueError: a shape, a dtype, ``eps``, ``group``, ``clip`` or ``implementation`` is not as above.
    """
    require(x.ndim >= 1, "x.shape", x.shape, "at least one dimension [..., K]")
    K = x.shape[-1]
    require(x.dtype.name in _FLOATS, "x.dtype", x.dtype.name, f"one of {_FLOATS}")
    require(group is None or group in GROUPS, "group", group, f"one of {GROUPS}, or None for a whole row")
    size = K if group is None else group
    require(K > 0 and K % size == 0, "x.shape", x.shape, f"K (last) a multiple of {size or 1}, at least 1")
    require_shape("weight", weight, (K,), "K")
    require(weight.dtype.name in _FLOATS, "weight.dtype", weight.dtype.name, f"one of {_FLOATS}")
    if residual is not None:
        require_shape("residual", residual, x.shape, "..., K")
        given, wanted = residual.dtype, x.dtype
        require(given == wanted, "residual.dtype", given.name, f"{wanted.name}, a float, as in x")
    plain = isinstance(eps, Real) and not isinstance(eps, bool) and 0 <= eps < math.inf
    require(plain, "eps", eps, "a finite number, at least 0")
    require(isinstance(clip, Real) and 0 < clip <= 1, "clip", clip, "above 0 and at most 1")
    kind = jnp.dtype(code_dtype)
    require(kind.name in EIGHT_BITS, "code_dtype", kind.name, f"one of {EIGHT_BITS}")
    rows = x.reshape(-1, K)
    options = {
        "residual": None if residual is None else residual.reshape(-1, K),
        "eps": float(eps),
        "group": group,
        "clip": float(clip),
        "code_dtype": kind,
    }
    module = dispatch.choose("norm_quant", implementation, rows, weight, **options)
    found, total = module.run(rows, weight, **options)
    # What is rounded has no slope; a cast to float8 would pass one on.
    found = QuantizedRows(jax.lax.stop_gradient(found.codes), found.scale)
    return found, None if total is None else total.reshape(x.shape)
