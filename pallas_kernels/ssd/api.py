"""Public entry of the SSD scan."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import count_segments, require, require_operand_dtype, require_shape


def ssd(
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, "H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "H"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B n H P N"] | None = None,
    num_segments: int | None = None,
    chunk_size: int = 128,
    operand_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H P"], Float[Array, "B n H P N"] | None]:
    """``S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t + D x_t`` for each head of each document.

    Source: Mamba-2, "Transformers are SSMs" (arXiv 2405.21060). H/G consecutive heads share a group's B and C.

    Args:
        x: inputs.
        dt: step sizes, at least 0, already biased, softplus-ed and clamped; taken as 0 on padding.
        A: decay rates, at most 0.
        B: input projections.
        C: output projections.
        D: weight of the skip connection; None for none.
        segment_ids: documents 1..n in row order, 0 = padding, whose values are never read. None: each row is one
            document.
        initial_state: state before each document's first token in this row; document s reads index s - 1. None:
            zeros.
        num_segments: n of the final state. None: n of ``initial_state``, or no final state.
        chunk_size: upper bound of the tokens per chunk. The result depends on it by rounding only; "xla" takes
            less where that is faster.
        operand_dtype: dtype to which the operands and cotangents of the chunk matmuls are rounded (sums are
            float32); None: float32. Decays and states are float32 always, and so is all of a one-token call.
        implementation: "auto", "xla" or "reference".

    Returns:
        y in the dtype of x (finite on padding, otherwise unspecified there), and the float32 state after each
        document's last token (its initial state if it does not occur), or None if no final state is wanted.

    Raises:
        ValueError: a shape, ``num_segments``, ``chunk_size``, ``operand_dtype`` or ``implementation`` is not as
            above, or G does not divide H.
    """
    require(x.ndim == 4, "x.shape", x.shape, "four dimensions [B, T, H, P]")
    rows, T, H, P = x.shape
    require(T >= 1, "x.shape", x.shape, "at least one token")
    require_shape("dt", dt, (rows, T, H), "B, T, H")
    require_shape("A", A, (H,), "H")
    require(B.ndim == 4 and B.shape[:2] == (rows, T), "B.shape", B.shape, f"({rows}, {T}, G, N) [B, T, G, N]")
    require_shape("C", C, B.shape, "B, T, G, N")
    require(H % B.shape[2] == 0, "B.shape", B.shape, f"G (third) to divide H = {H}")
    require_shape("D", D, (H,), "H")
    require_shape("segment_ids", segment_ids, (rows, T), "B, T")
    if initial_state is not None:
        shape = initial_state.shape
        require(len(shape) == 5, "initial_state.shape", shape, "five dimensions [B, n, H, P, N]")
        require_shape("initial_state", initial_state, (rows, shape[1], H, P, B.shape[3]), "B, n, H, P, N")
    require(chunk_size >= 1, "chunk_size", chunk_size, "at least 1")
    require_operand_dtype(operand_dtype)
    options = {
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "num_segments": count_segments(segment_ids, initial_state, num_segments),
        "chunk_size": chunk_size,
        "operand_dtype": operand_dtype,
    }
    module = dispatch.choose("ssd", implementation, x, dt, A, B, C, D, **options)
    return module.run(x, dt, A, B, C, D, **options)
