"""The one place where query heads and the queries of a window become what their KV head, or their row, needs."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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


def repeat_live(q: Float[Array, "B W H d"], live: Bool[Array, "B W"]) -> Float[Array, "B W H d"]:
    """``q`` with a window's padding replaced by its row's first live query, as ``Policy.select`` wants it.

    A row without a live query comes out as copies of its first; nothing that it selects is read.
    """
    first = jnp.argmax(live, axis=1)[:, None, None, None]
    return jnp.where(live[:, :, None, None], q, jnp.take_along_axis(q, first, axis=1))
