"""Public entry of attention."""

from dataclasses import replace
from typing import Literal, overload

from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import (
    require,
    require_booleans,
    require_floats,
    require_integers,
    require_operand_dtype,
    require_score_options,
    require_shape,
)
from pallas_kernels.attention.mask import Marks
from pallas_kernels.attention.options import Options

_LAYOUTS = {"BTKD": "B, S, K, d", "BKTD": "B, K, S, d"}


def _checked(
    q,
    k,
    v,
    q_positions,
    kv_positions,
    q_segment_ids,
    kv_segment_ids,
    mask,
    window,
    soft_cap,
    scale,
    kv_layout,
    operand_dtype,
) -> tuple[Marks, Options]:
    """What an implementation is given beside the arrays, once every argument is as the entries say."""
    require(kv_layout in _LAYOUTS, "kv_layout", kv_layout, "'BTKD' or 'BKTD'")
    require(q.ndim == 4, "q.shape", q.shape, "four dimensions [B, T, H, d]")
    B, T, H, d = q.shape
    require(min(T, H, d) >= 1, "q.shape", q.shape, "at least one query, head and channel [B, T, H, d]")
    letters = _LAYOUTS[kv_layout]
    shape = k.shape
    require(
        len(shape) == 4 and shape[0] == B and shape[3] == d,
        "k.shape",
        shape,
        f"[{letters}], B = {B}, d = {d}",
    )
    require_shape("v", v, shape, letters)
    S, K = (shape[1], shape[2]) if kv_layout == "BTKD" else (shape[2], shape[1])
    require(S >= 1 and K >= 1, "k.shape", shape, "at least one key")
    require(H % K == 0, "k.shape", shape, f"K = {K} to divide H = {H}")
    require_shape("q_positions", q_positions, (B, T), "B, T")
    require_shape("q_segment_ids", q_segment_ids, (B, T), "B, T")
    require_shape("kv_positions", kv_positions, (B, S), "B, S")
    require_shape("kv_segment_ids", kv_segment_ids, (B, S), "B, S")
    require_shape("mask", mask, (B, T, S), "B, T, S")
    require_floats(q=q, k=k, v=v)
    require_integers(
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
    )
    require_booleans(mask=mask)
    require_score_options(window, soft_cap, scale)
    require_operand_dtype(operand_dtype)
    scale = d**-0.5 if scale is None else scale
    marks = Marks(q_positions, kv_positions, q_segment_ids, kv_segment_ids, mask)
    return marks, Options(window, soft_cap, scale, kv_layout, operand_dtype)


@overload
def attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B _ _ d"],
    v: Float[Array, "B _ _ d"],
    *,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    mask: Bool[Array, "B T S"] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    kv_layout: str = "BTKD",
    operand_dtype: DTypeLike | None = None,
    return_lse: Literal[False] = False,
    implementation: str = "auto",
) -> Float[Array, "B T H d"]: ...


@overload
def attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B _ _ d"],
    v: Float[Array, "B _ _ d"],
    *,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    mask: Bool[Array, "B T S"] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    kv_layout: str = "BTKD",
    operand_dtype: DTypeLike | None = None,
    return_lse: Literal[True],
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]: ...


def attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B _ _ d"],
    v: Float[Array, "B _ _ d"],
    *,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    mask: Bool[Array, "B T S"] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    kv_layout: str = "BTKD",
    operand_dtype: DTypeLike | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B T H d"] | tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]:
    """Softmax attention in which a query sees the keys of its document at its own and earlier positions.

    A key is visible iff the segment ids agree and are not 0, ``kv_position <= q_position``,
    ``q_position - kv_position < window`` where a window is given, and ``mask`` holds where a mask is given. Query
    head h uses key head ``h // (H // K)``.

    Sources: grouped queries, arXiv 2305.13245; soft cap, ``soft_cap tanh(score / soft_cap)``, arXiv 2408.00118.

    Args:
        q: queries.
        k: keys, [B, S, K, d] or [B, K, S, d] as ``kv_layout`` says. Invisible keys and values may be anything
            finite.
        v: values, as k.
        q_positions: position of each query in its document.
        kv_positions: position of each key in its document.
        q_segment_ids: document of each query; 0 = padding.
        kv_segment_ids: document of each key; 0 = padding or an empty cache slot.
        mask: False hides a key (a tree's node from those that are not below it); None hides none.
        window: how many positions a query sees, its own included; None: all.
        soft_cap: bound of the scores before the mask; None: unbounded.
        scale: factor of the scores; None: ``d ** -0.5``.
        kv_layout: "BTKD" (fresh keys) or "BKTD" (cache pools: each head's keys contiguous).
        operand_dtype: dtype to which the operands and cotangents of both matmuls are rounded (sums and softmax
            are float32); None: that of k. One-token calls always take that of k, so that the cache is read as it
            is.
        return_lse: also return the float32 logarithm of each row's sum of exponentials, for merging.
        implementation: "auto", "mosaic_gpu" (Hopper; bfloat16 operands, a mask over at most 64 keys, d of 64,
            96, 128 or 256), "cudnn", "xla" or "reference".

    Returns:
        The output in the dtype of q, 0 where nothing is visible; with ``return_lse`` also lse [B, T, H], -inf
        where nothing is visible.

    Raises:
        ValueError: a shape, a dtype, ``window``, ``soft_cap``, ``kv_layout``, ``operand_dtype`` or ``implementation`` is
            not as above, or K does not divide H.
    """
    marks, options = _checked(
        q,
        k,
        v,
        q_positions,
        kv_positions,
        q_segment_ids,
        kv_segment_ids,
        mask,
        window,
        soft_cap,
        scale,
        kv_layout,
        operand_dtype,
    )
    given = (q, k, v, marks, replace(options, return_lse=return_lse))
    out, lse = dispatch.choose("attention", implementation, *given).run(*given)
    return (out, lse) if return_lse else out


def attention_backward(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B _ _ d"],
    v: Float[Array, "B _ _ d"],
    out: Float[Array, "B T H d"],
    lse: Float[Array, "B T H"],
    dout: Float[Array, "B T H d"],
    *,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    dlse: Float[Array, "B T H"] | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    kv_layout: str = "BTKD",
    operand_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T H d"], Float[Array, "B _ _ d"], Float[Array, "B _ _ d"]]:
    """Gradients of :func:`attention` from its final output and log-sum-exp.

    The keys given may be a part of those behind ``out`` and ``lse``: over all parts, the gradients of the queries add up
    and those of keys and values stand side by side. So attention whose keys lie on several devices is differentiated
    part by part, after the parts are merged.

    Args:
        q: queries, as in :func:`attention`; so are all arguments not named here.
        k: keys of this part.
        v: values of this part.
        out: the final output.
        lse: the final log-sum-exp, -inf where a query sees nothing.
        dout: cotangent of ``out``.
        dlse: cotangent of ``lse``; None: zeros.
        implementation: "auto", or one of those of :func:`attention` except "cudnn", which gives no log-sum-exp.

    Returns:
        Gradients of q, k and v, in their shapes and dtypes.

    Raises:
        ValueError: as :func:`attention`; or ``out``, ``lse``, ``dout`` or ``dlse`` has another shape.
    """
    marks, options = _checked(
        q,
        k,
        v,
        q_positions,
        kv_positions,
        q_segment_ids,
        kv_segment_ids,
        mask,
        window,
        soft_cap,
        scale,
        kv_layout,
        operand_dtype,
    )
    for name, array, letters in (
        ("out", out, "B, T, H, d"),
        ("dout", dout, "B, T, H, d"),
        ("lse", lse, "B, T, H"),
        ("dlse", dlse, "B, T, H"),
    ):
        require_shape(name, array, q.shape[: letters.count(",") + 1], letters)
    require_floats(out=out, dout=dout, lse=lse, dlse=dlse)
    settings = (marks, replace(options, return_lse=True))
    module = dispatch.choose("attention", implementation, q, k, v, *settings)
    return module.backward(q, k, v, out, lse, dout, dlse, *settings)
