"""Public entry of the convolution with input-generated kernels."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import count_segments, require, require_floats, require_shape
from pallas_kernels.causal_conv.activation import require_activation


def dynamic_conv(
    x: Float[Array, "B T D"],
    kernels: Float[Array, "B T k D"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B n k-1 D"] | None = None,
    num_segments: int | None = None,
    activation: str | None = "silu",
    implementation: str = "auto",
) -> tuple[Float[Array, "B T D"], Float[Array, "B n k-1 D"] | None]:
    """``y_t = act(sum_j kernels[t, j] u_{t-k+1+j})`` with u the inputs of t's own document.

    Source: Jet-Nemotron (arXiv 2508.15884), the convolution over values of JetBlock. A kernel belongs to the token whose
    output it makes, and is applied to inputs before it.

    Args:
        x: raw inputs.
        kernels: k taps for each token and channel, the oldest input first.
        segment_ids: documents 1..n in row order, 0 = padding, which may stand before, after and between
            documents, never inside one; its values are never read. None: each row is one document.
        initial_state: the k-1 raw inputs before each document's first token in this row; document s reads index
            s - 1. None: zeros.
        num_segments: n of the final state. None: n of ``initial_state``, or no final state.
        activation: "silu", or None for the identity.
        implementation: "auto", "mosaic_gpu" (Hopper), "xla" or "reference".

    Returns:
        y in the dtype of x (summed in float32, finite on padding, otherwise unspecified there), and the last k-1 raw
        inputs of each document, filled from the left with its initial state and equal to it if the document does not
        occur, in the dtype of ``initial_state`` (of x without one).

    Raises:
        ValueError: a shape, a dtype, ``num_segments``, ``activation`` or ``implementation`` is not as above.
    """
    require(x.ndim == 3, "x.shape", x.shape, "three dimensions [B, T, D]")
    B, T, D = x.shape
    require(T >= 1, "x.shape", x.shape, "at least one token")
    require(kernels.ndim == 4, "kernels.shape", kernels.shape, f"({B}, {T}, k, {D}) [B, T, k, D]")
    k = kernels.shape[2]
    require_shape("kernels", kernels, (B, T, k, D), "B, T, k, D")
    require(k >= 2, "kernels.shape", kernels.shape, "at least two taps")
    require_floats(x=x, kernels=kernels)
    require_activation(activation)
    options = {
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "num_segments": count_segments(
            segment_ids, initial_state, num_segments, tokens=(B, T), state=(k - 1, D), letters="k-1, D"
        ),
        "activation": activation,
    }
    module = dispatch.choose("dynamic_conv", implementation, x, kernels, **options)
    return module.run(x, kernels, **options)
