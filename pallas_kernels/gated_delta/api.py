"""Public entry of the gated delta rule."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import count_segments, require_count, require_operand_dtype
from pallas_kernels.gated_delta.checks import require_inputs


def gated_delta(
    q: Float[Array, "B T H dk"],
    k: Float[Array, "B T H dk"],
    v: Float[Array, "B T Hv dv"],
    g: Float[Array, "B T Hv"],
    beta: Float[Array, "B T Hv"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B n Hv dk dv"] | None = None,
    num_segments: int | None = None,
    open_ends: bool = False,
    chunk_size: int = 64,
    operand_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T Hv dv"], Float[Array, "B n Hv dk dv"] | None]:
    """``S' = exp(g_t) S_{t-1},  S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T,  o_t = S_t^T q_t`` for each head.

    Source: Gated Delta Networks (arXiv 2412.06464). Hv/H consecutive value heads read one query and key head: the
    products of keys with keys and queries, which take half the work of a chunk, are made once for all of them.
    Neither normalisation nor scale is applied: give q and k as they shall be multiplied.

    Args:
        q: queries.
        k: keys; of Euclidean length at most 1 where the recurrence shall not grow.
        v: values.
        g: log decays, at most 0; taken as 0 on padding.
        beta: strength of each write, in [0, 2]; taken as 0 on padding.
        segment_ids: documents 1..n in row order, 0 = padding, whose values are never read. None: each row is one
            document.
        initial_state: state before each document's first token in this row; document s reads index s - 1. None:
            zeros.
        num_segments: n of the final state. None: n of ``initial_state``, or no final state.
        open_ends: each row is a stretch of a longer text. Its first document goes on from ``initial_state``
            [B, 1, ...], the others begin with zeros, and the final state [B, 1, ...] is the one at the row's end.
        chunk_size: upper bound of the tokens per chunk. The result depends on it by rounding only.
        operand_dtype: dtype to which the operands and cotangents of the chunk matmuls are rounded (sums are
            float32); None: float32. Decays, the triangular inverse and states are float32 always, and so is all of
            a one-token call.
        implementation: "auto", "mosaic_gpu" (Hopper; bfloat16 operands, dk a multiple of 32 and dv of 64, both from 64
            to 256, a ``chunk_size`` of at least 64, of which it takes 64, more than one token), "xla" or "reference".

    Returns:
        o in the dtype of v (finite on padding, otherwise unspecified there), and the float32 state after each
        document's last token (its initial state if it does not occur), or None if no final state is wanted.

    Raises:
        ValueError: a shape, a dtype, ``num_segments``, ``chunk_size``, ``operand_dtype`` or ``implementation`` is not as
            above, or H does not divide Hv.
    """
    require_inputs(q, k, v, g, beta, "T")
    rows, T, _, dk = q.shape
    Hv, dv = v.shape[2:]
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
            state=(Hv, dk, dv),
            letters="Hv, dk, dv",
            open_ends=open_ends,
        ),
        "open_ends": open_ends,
        "chunk_size": chunk_size,
        "operand_dtype": operand_dtype,
    }
    module = dispatch.choose("gated_delta", implementation, q, k, v, g, beta, **options)
    return module.run(q, k, v, g, beta, **options)
