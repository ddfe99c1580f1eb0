"""Public entries: outputs of a tree of tokens, and the inputs to keep after one of its paths."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import require, require_booleans, require_floats, require_shape
from pallas_kernels.causal_conv.activation import activate, require_activation
from pallas_kernels.tree import depths, preceding


def causal_conv_window(
    x: Float[Array, "B W D"],
    weight: Float[Array, "k D"] | Float[Array, "B W k D"],
    bias: Float[Array, "D"] | None = None,
    *,
    ancestors: Bool[Array, "B W W"],
    initial_state: Float[Array, "B k-1 D"],
    activation: str | None = "silu",
    implementation: str = "auto",
) -> Float[Array, "B W D"]:
    """:func:`pallas_kernels.causal_conv.causal_conv`, or ``dynamic_conv``, along the path to every node.

    Args:
        x: raw inputs.
        weight: one filter of k taps per channel, the oldest input first; or one for every node and channel.
        bias: added before the activation; None for none.
        ancestors: as :func:`pallas_kernels.tree.ancestors` gives it; the values of padding reach no other node.
        initial_state: the k-1 raw inputs before the window, which nodes of depth below k-1 fall back to.
        activation: "silu", or None for the identity.
        implementation: "auto", "xla" or "reference".

    Returns:
        y in the dtype of x; finite at padding, otherwise unspecified there.

    Raises:
        ValueError: a shape, a dtype, ``activation`` or ``implementation`` is not as above.
    """
    require(x.ndim == 3, "x.shape", x.shape, "three dimensions [B, W, D]")
    rows, W, D = x.shape
    require(weight.ndim in (2, 4), "weight.shape", weight.shape, f"(k, {D}) [k, D], or [B, W, k, D]")
    k = weight.shape[-2]
    nodes, letters = ((rows, W), "B, W, k, D") if weight.ndim == 4 else ((), "k, D")
    require_shape("weight", weight, (*nodes, k, D), letters)
    require(W >= 1, "x.shape", x.shape, "at least one node")
    require(k >= 1, "weight.shape", weight.shape, "at least one tap")
    require_shape("bias", bias, (D,), "D")
    require_shape("ancestors", ancestors, (rows, W, W), "B, W, W")
    require_shape("initial_state", initial_state, (rows, k - 1, D), "B, k-1, D")
    require_floats(x=x, weight=weight, bias=bias, initial_state=initial_state)
    require_booleans(ancestors=ancestors)
    require_activation(activation)
    options = {"ancestors": ancestors, "initial_state": initial_state}
    module = dispatch.choose("causal_conv.window", implementation, x, weight, **options)
    y = module.run(x, weight.astype(jnp.float32), **options)
    y = y if bias is None else y + bias.astype(jnp.float32)
    return activate(y, activation).astype(x.dtype)


def causal_conv_commit(
    x: Float[Array, "B W D"],
    ancestors: Bool[Array, "B W W"],
    accepted: Bool[Array, "B W"],
    initial_state: Float[Array, "B r D"],
) -> Float[Array, "B r D"]:
    """The last r = k-1 raw inputs after one path of the window, of either convolution, filled from the left with ``initial_state``.

    Args:
        x: raw inputs of the window.
        ancestors: as in :func:`causal_conv_window`.
        accepted: the nodes of the path: its last node and all its ancestors. None of a row's: its state is kept.
        initial_state: the r raw inputs before the window; the result has its dtype.

    Raises:
        ValueError: a shape is not as above.
    """
    rows, W, D = x.shape
    reach = initial_state.shape[1]
    require_shape("ancestors", ancestors, (rows, W, W), "B, W, W")
    require_shape("accepted", accepted, (rows, W), "B, W")
    require_shape("initial_state", initial_state, (rows, reach, D), "B, r, D")
    last = jnp.sum(accepted, axis=1, keepdims=True, dtype=jnp.int32) - 1
    at = preceding(accepted[:, None], depths(ancestors), last, reach, reach)[:, 0]
    inputs = jnp.concatenate([initial_state, x.astype(initial_state.dtype)], axis=1)
    return jnp.take_along_axis(inputs, at[..., None], axis=1)
