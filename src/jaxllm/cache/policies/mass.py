"""How much attention every stored token received in a prefill, from what fused attention leaves behind."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxllm.cache.policies.base import Seen
from jaxllm.cache.view import View
from pallas_kernels.precision import contract

# Queries whose probabilities exist at once.
_BLOCK = 32


def column_mass(view: View, seen: Seen, block: int = _BLOCK) -> Float[Array, "B K L"]:
    """Probability of every stored token, summed over the step's live queries, averaged over a KV head's query heads.

    Args:
        view: the rows, the step's tokens among them.
        seen: of attention over everything stored up to each query's own token.
        block: queries whose probabilities, [B, H, block, L], exist at once.
    """
    keys = view.keys()
    B, T, H, d = seen.q.shape
    heads, tokens = keys.shape[1], view.tokens
    number = jnp.arange(tokens)

    def rest(x, fill):
        # Padding is a query that sees nothing.
        return jnp.pad(x, ((0, 0), (0, -T % block), *((0, 0),) * (x.ndim - 2)), constant_values=fill)

    q, lse, last = rest(seen.q, 0), rest(seen.lse, 0), rest(seen.q_tokens, -1)

    def add(i, total):
        def part(x):
            return lax.dynamic_slice_in_dim(x, i * block, block, 1)

        rows = part(q).astype(jnp.float32).reshape(B, block, heads, H // heads, d)
        scores = contract("btkgd,bkld->bkgtl", rows, keys) * view.scale
        left = jnp.moveaxis(part(lse).reshape(B, block, heads, H // heads), 1, 3)
        visible = (number <= part(last)[..., None])[:, None, None]
        probability = jnp.exp(jnp.where(visible, scores - left[..., None], -jnp.inf))
        return total + jnp.mean(jnp.sum(probability, axis=3), axis=2)

    return lax.fori_loop(0, -(-T // block), add, jnp.zeros((B, heads, tokens), jnp.float32))
