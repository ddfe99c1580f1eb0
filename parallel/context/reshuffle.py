"""From tokens in the order of documents to workers' slots and back, inside the program that uses them."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def to_slots(x: Shaped[Array, "T ..."], index: Int[Array, "..."]) -> Shaped[Array, "..."]:
    """Tokens at their places, [*index.shape, ...]; padding is zeros.

    Args:
        x: packed documents, one after the other; what follows the last one is not read.
        index: of a :class:`parallel.context.layout.Layout`, of all workers or of one.
    """
    return jnp.take(x, jnp.where(index < 0, x.shape[0], index), axis=0, mode="fill", fill_value=0)


def from_slots(
    slots: Shaped[Array, "..."], index: Int[Array, "..."], tokens: int
) -> Shaped[Array, "{tokens} ..."]:
    """The inverse of :func:`to_slots`; tokens that stand in none of the slots are zeros.

    Args:
        slots: [*index.shape, ...], of all workers or of one.
        index: as there.
        tokens: T, of the result.
    """
    rest = slots.shape[index.ndim :]
    # Distinct places beyond the end for padding, so that no two writes meet.
    flat = index.reshape(-1)
    at = jnp.where(flat < 0, tokens + jnp.arange(flat.size), flat)
    whole = jnp.zeros((tokens, *rest), slots.dtype)
    return whole.at[at].set(slots.reshape(-1, *rest), mode="drop", unique_indices=True)
