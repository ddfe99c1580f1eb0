"""The one place where scores of query heads become scores of their KV head."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import require

REDUCTIONS = ("max", "mean", "sum")


def reduce_heads(scores: Float[Array, "B K G *n"], how: str) -> Float[Array, "B K *n"]:
    """One score for the G query heads (or G heads of W queries) of each KV head.

    Args:
        scores: of every query head, grouped by KV head.
        how: "max" keeps a bound a bound; "mean"; "sum".

    Raises:
        ConfigError: ``how`` is not as above.
    """
    require(how in REDUCTIONS, "reduce", how, f"one of {', '.join(REDUCTIONS)}")
    return {"max": jnp.max, "mean": jnp.mean, "sum": jnp.sum}[how](scores, axis=2)
