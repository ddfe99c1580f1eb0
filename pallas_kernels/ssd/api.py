"""Public entry of the SSD scan."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import count_segments, require_count, require_operand_dtype
from pallas_kernels.ssd.checks import require_inputs


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
    open_ends: bool = False,
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
        open_ends: each row is a stretch of a longer text. Its first document goes on from ``initial_state``
            [B, 1, ...], the others begin with zeros, and the final state [B, 1, ...] is the one at the row's end.
        chunk_size: upper bound of the tokens per chunk. The result depends on it by rounding only; "xla" takes
            less where that is faster.
        operand_dtype: dtype to which the operands and cotangents of the chunk matmuls are rounded (sums are
            float32); None: float32. Decays and states are float32 always, and so is all of a one-token call.
        implementation: "auto", "mosaic_gpu" (Hopper; bfloat16 operands, P and N of 64 or 128, chunks of at least 64,
            more than one token), "xla" or "reference".

    Returns:
        y in the dtype of x (finite on padding, otherwise unspecified there), and the float32 state after each
        document's last token (its initial state if it does not occur), or None if no final state is wanted.

    Raises:
        ValueError: a shape, a dtype, ``num_segments``, ``chunk_size``, ``operand_dtype`` or ``implementation`` is not as
            above, or G does not divide H.
    """
    require_inputs(x, dt, A, B, C, D, "T")
    rows, T, H, P = x.shape
    require_count("chunk_size", chunk_size)
    require_operand_dtype(operand_dtype)
    options = {
        "segment_ids": segment_ids,
        "initial_state": initial_state,
        "num_segments": count_segments(
            segment_ids,
            initial_state,
            num_segments,
            tokens=(rows, T),
            state=(H, P, B.shape[3]),
            letters="H, P, N",
            open_ends=open_ends,
        ),
        "open_ends": open_ends,
        "chunk_size": chunk_size,
        "operand_dtype": operand_dtype,
    }
    module = dispatch.choose("ssd", implementation, x, dt, A, B, C, D, **options)
    return module.run(x, dt, A, B, C, D, **options)
