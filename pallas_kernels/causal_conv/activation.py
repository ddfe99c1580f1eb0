"""What may follow a convolution."""

import jax
from jaxtyping import Array, Float

from pallas_kernels.arguments import require


def require_activation(activation: str | None) -> None:
    """Raise unless ``activation`` is "silu", or None for the identity."""
    require(activation in ("silu", None), "activation", activation, "'silu' or None")


def activate(y: Float[Array, "..."], activation: str | None) -> Float[Array, "..."]:
    """``y`` after ``activation``."""
    return jax.nn.silu(y) if activation == "silu" else y
