"""Checks of the arrays that the scan and its window share."""

from jaxtyping import Array, Float

from pallas_kernels.arguments import require, require_floats, require_shape


def require_inputs(
    x: Float[Array, "..."],
    dt: Float[Array, "..."],
    A: Float[Array, "..."],
    B: Float[Array, "..."],
    C: Float[Array, "..."],
    D: Float[Array, "..."] | None,
    T: str,
) -> None:
    """Raise the ValueError of a bad shape or dtype; ``T`` is the letter of the second dimension."""
    require(x.ndim == 4, "x.shape", x.shape, f"four dimensions [B, {T}, H, P]")
    rows, tokens, H, _ = x.shape
    require(tokens >= 1, "x.shape", x.shape, "at least one token")
    require_shape("dt", dt, (rows, tokens, H), f"B, {T}, H")
    require_shape("A", A, (H,), "H")
    fits = B.ndim == 4 and B.shape[:2] == (rows, tokens) and B.shape[2] >= 1
    require(fits, "B.shape", B.shape, f"({rows}, {tokens}, G, N) [B, {T}, G, N]")
    require_shape("C", C, B.shape, f"B, {T}, G, N")
    require(H % B.shape[2] == 0, "B.shape", B.shape, f"G (third) to divide H = {H}")
    require_shape("D", D, (H,), "H")
    require_floats(x=x, dt=dt, A=A, B=B, C=C, D=D)
