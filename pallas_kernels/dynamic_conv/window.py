"""The convolution with input-generated kernels along every path of a tree of tokens.

Its commit is :func:`pallas_kernels.causal_conv.window.causal_conv_commit`: what is kept are raw inputs in either case.
"""

import jax
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import require, require_shape


def dynamic_conv_window(
    x: Float[Array, "B W D"],
    kernels: Float[Array, "B W k D"],
    *,
    ancestors: Bool[Array, "B W W"],
    initial_state: Float[Array, "B k-1 D"],
    activation: str | None = "silu",
    implementation: str = "auto",
) -> Float[Array, "B W D"]:
    """:func:`pallas_kernels.dynamic_conv.dynamic_conv` along the path to every node.

    Args:
        x: raw inputs.
        kernels: k taps for each node and channel, the oldest input first.
        ancestors: as :func:`pallas_kernels.tree.ancestors` gives it; the values of padding reach no other node.
        initial_state: the k-1 raw inputs before the window, which nodes of depth below k-1 fall back to.
        activation: "silu", or None for the identity.
        implementation: "auto", "xla" or "reference".

    Returns:
        y in the dtype of x; unspecified at padding.

    Raises:
        ValueError: a shape, ``activation`` or ``implementation`` is not as above.
    """
    require(x.ndim == 3, "x.shape", x.shape, "three dimensions [B, W, D]")
    rows, W, D = x.shape
    require(kernels.ndim == 4, "kernels.shape", kernels.shape, f"({rows}, {W}, k, {D}) [B, W, k, D]")
    k = kernels.shape[2]
    require_shape("kernels", kernels, (rows, W, k, D), "B, W, k, D")
    require_shape("ancestors", ancestors, (rows, W, W), "B, W, W")
    require_shape("initial_state", initial_state, (rows, k - 1, D), "B, k-1, D")
    require(activation in ("silu", None), "activation", activation, "'silu' or None")
    options = {"ancestors": ancestors, "initial_state": initial_state}
    module = dispatch.choose("causal_conv.window", implementation, x, kernels, **options)
    y = module.run(x, kernels.astype("float32"), **options)
    return (jax.nn.silu(y) if activation == "silu" else y).astype(x.dtype)
