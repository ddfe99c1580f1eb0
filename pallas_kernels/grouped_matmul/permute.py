"""Tokens to rows sorted by expert and back. Both directions gather, forward and backward: repeatable bit for bit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Plan(NamedTuple):
    """A permutation of the T * k rows that T tokens make.

    Attributes:
        order: i32[T k]; place r holds row ``order[r]``, the copy ``order[r] % k`` of token ``order[r] // k``.
        inverse: i32[T, k]; the place of each copy of each token.
        sizes: i32[E]; rows of each expert, which come first; copies that go nowhere come last.
    """

    order: Array
    inverse: Array
    sizes: Array


def plan(ids: Int[Array, "T k"], experts: int) -> Plan:
    """Sort by expert, tokens in order within one.

    Args:
        ids: expert of each copy of each token, in [0, experts]; ``experts`` is none.
        experts: E.
    """
    flat = ids.reshape(-1).astype(jnp.int32)
    order = sorted_order(flat, experts)
    index = jnp.arange(len(flat), dtype=jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(index, unique_indices=True)
    return Plan(order, inverse.reshape(ids.shape), jnp.bincount(flat, length=experts).astype(jnp.int32))


def sorted_order(flat: Int[Array, " M"], experts: int) -> Int[Array, " M"]:
    """Stable argsort of ids in [0, experts]."""
    rows = len(flat)
    if (experts + 1) * rows < 2**31:
        # One key: XLA:CPU sorts that four times as fast as pairs.
        return jnp.sort(flat * rows + jnp.arange(rows, dtype=jnp.int32)) % rows
    return jnp.argsort(flat, stable=True).astype(jnp.int32)


@jax.custom_vjp
def to_experts(x: Float[Array, "T D"], plan: Plan) -> Float[Array, "M D"]:
    """Each token's copies at their places."""
    return x[plan.order // plan.inverse.shape[1]]


def _to_experts_bwd(plan, g):
    return jnp.sum(g[plan.inverse], axis=1, dtype=jnp.float32).astype(g.dtype), None


to_experts.defvjp(lambda x, plan: (to_experts(x, plan), plan), _to_experts_bwd)


@jax.custom_vjp
def _collect(y, plan):
    return y[plan.inverse]


_collect.defvjp(
    lambda y, plan: (_collect(y, plan), plan),
    lambda plan, g: (g.reshape(-1, g.shape[-1])[plan.order], None),
)


def from_experts(y: Float[Array, "M D"], weights: Float[Array, "T k"], plan: Plan) -> Float[Array, "T D"]:
    """Weighted sum of each token's copies, in float32, in the dtype of y."""
    copies: Array = _collect(y, plan)
    return jnp.sum(copies.astype(jnp.float32) * weights[..., None], axis=1).astype(y.dtype)
