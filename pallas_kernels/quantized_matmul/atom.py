"""Atom's W4A4: 4-bit codes in groups of 128 inputs, and the inputs of most energy, ordered last, in int8.

``y = sum_g (int32 sum of group g) * (row's scale of g * output's scale of g) + (int32 sum of the outliers) * (their scales)``,
scales multiplied in float32. Rows are quantised as they come, each group of each row by its own largest magnitude. The order
is found once from calibration, and weights are stored in it; rows are gathered into it.

Hopper has no tensor cores for integers of 4 bits: there the body is the product of W4A8, with rows' codes one to a byte, and
the outliers one of W8A8, added in float32. What 4 bits save on Hopper is memory of the weights.

Source: "Atom: Low-bit Quantization for Efficient and Accurate LLM Serving" (arXiv 2310.19102) and its public code: rounding to
nearest. GPTQ, which it uses beside it, is not here.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import require, require_shape
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.codes import (
    QuantizedRows,
    QuantizedWeight,
    quantize_rows,
    quantize_weight,
)

# Inputs that share a scale, and those that stay in 8 bits.
GROUP = OUTLIERS = 128
ROW_CLIP, WEIGHT_CLIP = 0.9, 0.85


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AtomWeight:
    """A weight of N outputs and K inputs in the order of :func:`outliers_last`.

    Attributes:
        body: 4-bit codes of the first K - 128 inputs, groups of 128.
        outliers: int8 codes of the last 128, a scale an output.
    """

    body: QuantizedWeight
    outliers: QuantizedWeight

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        N, K = self.body.shape
        return N, K + OUTLIERS

    def nbytes(self) -> int:
        """Bytes held."""
        return self.body.nbytes() + self.outliers.nbytes()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AtomRows:
    """M rows of K activations in the same order, which several products may share.

    Attributes:
        body: codes -8..7 one to a byte, and f32[M, K / 128 - 1] scales.
        outliers: int8 codes of the last 128, a scale a row.
    """

    body: QuantizedRows
    outliers: QuantizedRows

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        M, K = self.body.shape
        return M, K + OUTLIERS


def outliers_last(energy: Float[Array, "K"]) -> Int[Array, "K"]:
    """The inputs in order of rising energy, so that those kept in 8 bits come last; equal ones stay in order.

    Args:
        energy: of each input, its mean square over calibration tokens (the diagonal of GPTQ's Hessian) or mean magnitude.

    Raises:
        ValueError: energy has other than one dimension.
    """
    require(energy.ndim == 1, "energy.shape", energy.shape, "one dimension [K], a number an input")
    return jnp.argsort(energy, stable=True)


def _ordered(x: Any, order: Any, name: str) -> Any:
    """``x`` with its inputs in ``order``, checked."""
    require(x.ndim == 2, f"{name}.shape", x.shape, "two dimensions, inputs last")
    K = x.shape[1]
    least = GROUP + OUTLIERS
    require(
        K % GROUP == 0 and least <= K, f"{name}.shape", x.shape, f"K a multiple of {GROUP}, {least} or more"
    )
    if order is None:
        return x
    require_shape("order", order, (K,), "K, as outliers_last gives it")
    require(jnp.issubdtype(order.dtype, jnp.integer), "order.dtype", order.dtype.name, "integers")
    return jnp.take(x, order, axis=1)


def quantize_atom_weight(
    w: Float[Array, "N K"],
    order: Int[Array, "K"] | None = None,
    *,
    clip: float = WEIGHT_CLIP,
    shared: int = 2,
    scale_dtype: DTypeLike = jnp.float16,
) -> AtomWeight:
    """Weights rounded to nearest: 4 bits in groups of 128 inputs, the last 128 inputs in 8 bits, unclipped.

    Args:
        w: finite values, K-major, K a multiple of 128, 256 or more.
        order: of the inputs, as :func:`outliers_last` gives it; None: they are in it.
        clip: factor of the range of 4 bits.
        shared: neighbouring outputs that share the scales of 4 bits (which are stored once for each).
        scale_dtype: float16, bfloat16 or float32.

    Raises:
        ValueError: an argument is not as above, or ``shared`` does not divide N.
    """
    w = _ordered(w, order, "w")
    body, last = w[:, :-OUTLIERS], w[:, -OUTLIERS:]
    return AtomWeight(
        quantize_weight(body, group=GROUP, clip=clip, shared=shared, scale_dtype=scale_dtype),
        quantize_weight(last, bits=8, group=None, scale_dtype=scale_dtype),
    )


def quantize_atom_rows(
    x: Float[Array, "M K"], order: Int[Array, "K"] | None = None, *, clip: float = ROW_CLIP
) -> AtomRows:
    """Activations rounded to nearest: 4 bits, a scale for each row and group of 128, the last 128 in 8 bits, unclipped.

    Args:
        x: finite rows, K a multiple of 128, 256 or more.
        order: of the inputs, as of the weights; None: they are in it.
        clip: factor of the range of 4 bits.

    Raises:
        ValueError: an argument is not as above.
    """
    x = _ordered(x, order, "x")
    body, last = x[:, :-OUTLIERS], x[:, -OUTLIERS:]
    return AtomRows(quantize_rows(body, bits=4, group=GROUP, clip=clip), quantize_rows(last))


def atom_matmul(
    x: AtomRows, w: AtomWeight, *, out_dtype: DTypeLike = jnp.float32, implementation: str = "auto"
) -> Float[Array, "M N"]:
    """``x @ W.T`` of codes: integers summed exactly in each group, then scaled and added in float32.

    Two calls of :func:`quantized_matmul`, whose ``implementation`` this is, and as differentiable as that: by scales.

    Raises:
        ValueError: K of x and w differ, or an argument is not as there.
    """
    require(x.shape[1] == w.shape[1], "x.shape", x.shape, f"K (second) to be {w.shape[1]}, as in w [N, K]")
    parts = [
        quantized_matmul(rows, part, implementation=implementation)
        for rows, part in ((x.body, w.body), (x.outliers, w.outliers))
    ]
    return (parts[0] + parts[1]).astype(out_dtype)
