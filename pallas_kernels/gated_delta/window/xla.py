"""One triangular system for the writes of all nodes, taken in order of depth, then masked matmuls."""

import jax.numpy as jnp

from pallas_kernels.gated_delta.triangular import unit_lower_inverse
from pallas_kernels.precision import contract
from pallas_kernels.tree import depths, path_decays

REASON = "masked matmuls and a triangular inverse fused by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def run(q, k, v, g, beta, *, ancestors, initial_state):
    rows, W, H, dk = q.shape
    Hv, dv = v.shape[2:]
    # Ancestors first: the system is then triangular, whatever the order of the nodes.
    order = jnp.argsort(depths(ancestors), axis=1)
    back = jnp.argsort(order, axis=1)

    def sorted_nodes(x, by, axis=1):
        index = by.reshape(rows, *[W if i == axis else 1 for i in range(1, x.ndim)])
        return jnp.take_along_axis(x, index, axis=axis)

    q, k, v, g, beta = (sorted_nodes(x, order) for x in (q, k, v, g, beta))
    mask = sorted_nodes(sorted_nodes(ancestors, order), order, axis=2)
    S = initial_state.reshape(rows, H, Hv // H, dk, dv)
    total = jnp.einsum("bij,bjh->bhi", mask.astype(jnp.float32), g, precision="highest")
    pair = path_decays(mask, total)
    pair, out = pair.reshape(rows, H, -1, W, W), jnp.exp(total).reshape(rows, H, -1, W)
    q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    v = jnp.moveaxis(v.reshape(rows, W, H, -1, dv), 1, 3)
    beta = jnp.moveaxis(beta.reshape(rows, W, H, -1), 1, 3)
    strict = jnp.tril(jnp.ones((W, W), bool), -1)
    overlap = contract("bhik,bhjk->bhij", k, k)[:, :, None]
    inverse = unit_lower_inverse(jnp.where(strict, beta[..., None] * overlap * pair, 0))
    read = contract("bhik,bhekv->bheiv", jnp.concatenate([k, q], axis=2), S)
    right = beta[..., None] * (v - out[..., None] * read[..., :W, :])
    write = contract("bheij,bhejv->bheiv", inverse, right)
    scores = contract("bhik,bhjk->bhij", q, k)[:, :, None] * pair
    o = out[..., None] * read[..., W:, :] + contract("bheij,bhejv->bheiv", scores, write)

    def as_given(x):
        return sorted_nodes(jnp.moveaxis(x, 3, 1).reshape(rows, W, Hv, dv), back)

    return as_given(o), as_given(write)
