"""Checks of the arrays that the delta rule and its window share."""

from jaxtyping import Array, Float

from pallas_kernels.arguments import require, require_floats, require_shape


def require_inputs(
    q: Float[Array, "..."],
    k: Float[Array, "..."],
    v: Float[Array, "..."],
    g: Float[Array, "..."],
    beta: Float[Array, "..."],
    T: str,
) -> None:
    """Raise the ValueError of a bad shape or dtype; ``T`` is the letter of the second dimension."""
    require(q.ndim == 4, "q.shape", q.shape, f"four dimensions [B, {T}, H, dk]")
    rows, tokens, H, _ = q.shape
    require(tokens >= 1 and H >= 1, "q.shape", q.shape, "at least one token and head")
    require_shape("k", k, q.shape, f"B, {T}, H, dk")
    fits = v.ndim == 4 and v.shape[:2] == (rows, tokens)
    require(fits, "v.shape", v.shape, f"({rows}, {tokens}, Hv, dv) [B, {T}, Hv, dv]")
    Hv = v.shape[2]
    require(Hv % H == 0, "v.shape", v.shape, f"Hv (third) to be a multiple of H = {H}")
    require_shape("g", g, (rows, tokens, Hv), f"B, {T}, Hv")
    require_shape("beta", beta, (rows, tokens, Hv), f"B, {T}, Hv")
    require_floats(q=q, k=k, v=v, g=g, beta=beta)
