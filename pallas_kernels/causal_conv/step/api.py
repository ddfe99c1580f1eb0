"""Public entry of the decode step of the causal convolution."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import require, require_floats, require_shape
from pallas_kernels.causal_conv.activation import require_activation
from pallas_kernels.slots import require_slots


def causal_conv_step(
    x: Float[Array, "B D"],
    weight: Float[Array, "k D"],
    bias: Float[Array, "D"] | None = None,
    *,
    pool: Float[Array, "S k-1 D"],
    slots: Int[Array, "B"] | None = None,
    live: Bool[Array, "B"] | None = None,
    activation: str | None = "silu",
    implementation: str = "auto",
) -> tuple[Float[Array, "B D"], Float[Array, "S k-1 D"]]:
    """:func:`pallas_kernels.causal_conv.causal_conv` of one token per row, the k-1 inputs before it in a slot of a pool.

    Args:
        x: raw inputs.
        weight: one filter of k taps per channel, the oldest input first.
        bias: added before the activation; None for none.
        pool: the last k-1 raw inputs of every slot. Donate it, else it is copied first.
        slots: the slot of each row, no slot twice; -1: the row is idle. None: row b has slot b.
        live: False where a row is idle: its input is never read, its slot stays as it is. None: all.
        activation: "silu", or None for the identity.
        implementation: "auto", "mosaic_gpu" (Hopper), "xla" or "reference".

    Returns:
        y in the dtype of x (summed in float32, 0 in idle rows), and the pool with the windows of these slots moved on
        by their inputs.

    Raises:
        ValueError: a shape, a dtype, ``activation`` or ``implementation`` is not as above.
    """
    require(x.ndim == 2, "x.shape", x.shape, "two dimensions [B, D]")
    rows, D = x.shape
    require(weight.ndim == 2 and weight.shape[1] == D, "weight.shape", weight.shape, f"(k, {D}) [k, D]")
    k = weight.shape[0]
    require(k >= 2, "weight.shape", weight.shape, "at least two taps")
    require_shape("bias", bias, (D,), "D")
    require(pool.ndim == 3, "pool.shape", pool.shape, "three dimensions [S, k-1, D]")
    require_shape("pool", pool, (pool.shape[0], k - 1, D), "S, k-1, D")
    require_slots(slots, live, rows, pool)
    require_floats(x=x, weight=weight, bias=bias, pool=pool)
    require_activation(activation)
    options = {"pool": pool, "slots": slots, "live": live, "activation": activation}
    module = dispatch.choose("causal_conv.step", implementation, x, weight, bias, **options)
    return module.run(x, weight, bias, **options)
