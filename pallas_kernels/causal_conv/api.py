"""Public entry of the causal convolution."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import count_segments, require, require_floats, require_shape
from pallas_kernels.causal_conv.activation import require_activation


def causal_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "k D"],
    bias: Float[Array, "D"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B n k-1 D"] | None = None,
    num_segments: int | None = None,
    activation: str | None = "silu",
    implementation: str = "auto",
) -> tuple[Float[Array, "B T D"], Float[Array, "B n k-1 D"] | None]:
    """``y_t = act(bias + sum_j weight[j] u_{t-k+1+j})`` with u the inputs of t's own document.

    Source: the short convolution of Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060).

    Args:
        x: raw inputs.
        weight: one filter of k taps per channel, the oldest input first.
        bias: added before the activation; None for none.
        segment_ids: documents 1..n in row order, 0 = padding, which may stand before, after and between
            documents, never inside one; its values are never read. None: each row is one document.
        initial_state: the k-1 raw inputs before each document's first token in this row; document s reads index
            s - 1. None: zeros.
        num_segments: n of the final state. None: n of ``initial_state``, or no final state.
        activation: "silu", or None for the identity.
        implementation: "auto", "mosaic_gpu" (Hopper), "xla" or "reference".

    Returns:
        y in the dtype of x (finite on padding, otherwise unspecified there), and the last k-1 raw inputs of each
        document, filled from the left with its initial state and equal to it if the document does not occur, in
        the dtype of ``initial_state`` (of x without one).

    Raises:
        ValueError: a shape, a dtype, ``num_segments``, ``activation`` or ``implementation`` is not as above.
    """
    require(x.ndim == 3, "x.shape", x.shape, "three dimensions [B, T, D]")
    B, T, D = x.shape
    require(T >= 1, "x.shape", x.shape, "at least one token")
    require(weight.ndim == 2 and weight.shape[1] == D, "weight.shape", weight.shape, f"(k, {D}) [k, D]")
    k = weight.shape[0]
    require(k >= 1, "weight.shape", weight.shape, "at least one tap")
    require_shape("bias", bias, (D,), "D")
    require_floats(x=x, weight=weight, bias=bias)
    require_activation(activation)
    options = {
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "num_segments": count_segments(
            segment_ids, initial_state, num_segments, tokens=(B, T), state=(k - 1, D), letters="k-1, D"
        ),
        "activation": activation,
    }
    module = dispatch.choose("causal_conv", implementation, x, weight, bias, **options)
    return module.run(x, weight, bias, **options)
