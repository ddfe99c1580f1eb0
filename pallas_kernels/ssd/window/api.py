"""Public entries: outputs of a tree of tokens, and the state after one of its paths."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import require_booleans, require_floats, require_shape
from pallas_kernels.precision import contract
from pallas_kernels.ssd.checks import require_inputs
from pallas_kernels.tree import live_values, path_sums, state_after


class Factors(NamedTuple):
    """What a window leaves behind instead of W states: float32, zeros at padding.

    Attributes:
        xb: ``dt x``, f32[B, W, H, P].
        B: input projections, f32[B, W, G, N].
        decay: sum of the log decays on the path to each node, its own included, f32[B, W, H].
    """

    xb: Any
    B: Any
    decay: Any


def ssd_window(
    x: Float[Array, "B W H P"],
    dt: Float[Array, "B W H"],
    A: Float[Array, "H"],
    B: Float[Array, "B W G N"],
    C: Float[Array, "B W G N"],
    D: Float[Array, "H"] | None = None,
    *,
    ancestors: Bool[Array, "B W W"],
    initial_state: Float[Array, "B H P N"],
    implementation: str = "auto",
) -> tuple[Float[Array, "B W H P"], Factors]:
    """:func:`pallas_kernels.ssd.ssd` along the path to every node, without a state for any of them.

    With ``S_i`` the sum of ``dt A`` over i and its ancestors,
    ``y_i = exp(S_i) h_0 C_i + sum_j exp(S_i - S_j) (C_i . B_j) dt_j x_j + D x_i`` over the same nodes j: the quadratic
    form of state-space duality (arXiv 2405.21060, section 3) with the causal mask replaced by the tree's. Everything
    is float32, as in a one-token call of ``ssd``.

    Args:
        x: inputs.
        dt: step sizes, at least 0, already biased, softplus-ed and clamped.
        A: decay rates, at most 0.
        B: input projections; H/G consecutive heads share a group's.
        C: output projections.
        D: weight of the skip connection; None for none.
        ancestors: as :func:`pallas_kernels.tree.ancestors` gives it; the values of padding are never read.
        initial_state: state before the window.
        implementation: "auto", "xla" or "reference".

    Returns:
        y in the dtype of x, 0 at padding; and the factors from which :func:`ssd_commit` makes the state.

    Raises:
        ValueError: a shape, a dtype or ``implementation`` is not as above, or G does not divide H.
    """
    require_inputs(x, dt, A, B, C, D, "W")
    rows, W, H, P = x.shape
    require_shape("ancestors", ancestors, (rows, W, W), "B, W, W")
    require_booleans(ancestors=ancestors)
    require_floats(initial_state=initial_state)
    require_shape("initial_state", initial_state, (rows, H, P, B.shape[3]), "B, H, P, N")
    x32, dt, B, C = live_values(ancestors, x, dt, B, C)
    a = dt * A.astype(jnp.float32)
    factors = Factors(dt[..., None] * x32, B, path_sums(ancestors, a))
    options = {"ancestors": ancestors, "initial_state": initial_state.astype(jnp.float32)}
    module = dispatch.choose("ssd.window", implementation, factors, a, C, **options)
    y = module.run(factors, a, C, **options)
    y = y if D is None else y + D.astype(jnp.float32)[:, None] * x32
    return y.astype(x.dtype), factors


def ssd_commit(
    factors: Factors, accepted: Bool[Array, "B W"], initial_state: Float[Array, "B H P N"]
) -> Float[Array, "B H P N"]:
    """The float32 state after one path of the window: ``exp(S_e) h_0 + sum_j exp(S_e - S_j) dt_j x_j B_j^T``.

    Args:
        factors: of :func:`ssd_window`.
        accepted: the nodes of the path: its last node e and all its ancestors. None of a row's: its state is kept
            bit by bit.
        initial_state: state before the window.

    Raises:
        ValueError: a shape is not as above.
    """
    rows, W, H, P = factors.xb.shape
    G, N = factors.B.shape[2:]
    require_shape("accepted", accepted, (rows, W), "B, W")
    require_shape("initial_state", initial_state, (rows, H, P, N), "B, H, P, N")

    def written(weights: Array) -> Array:
        weighted = (weights[..., None] * factors.xb).reshape(rows, W, G, -1)
        return contract("bjgm,bjgn->bgmn", weighted, factors.B).reshape(initial_state.shape)

    return state_after(factors.decay, accepted, initial_state, written)
