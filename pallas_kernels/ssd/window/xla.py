"""The masked quadratic form: two matmuls inside the window, one with the state before it."""

import jax.numpy as jnp

from pallas_kernels.precision import contract
from pallas_kernels.tree import path_decays

REASON = "masked matmuls fused by XLA"


def supports(*_args, **_options) -> str | None:
    return None


def run(factors, a, C, *, ancestors, initial_state):
    del a
    xb, B, S = factors
    rows, W, H, P = xb.shape
    G = B.shape[2]
    B, C = B.swapaxes(1, 2), C.swapaxes(1, 2)
    S = S.swapaxes(1, 2)
    pair = path_decays(ancestors, S)
    scores = contract("bgin,bgjn->bgij", C, B)[:, :, None] * pair.reshape(rows, G, H // G, W, W)
    heads = xb.swapaxes(1, 2)
    y = contract("bhij,bhjp->bhip", scores.reshape(rows, H, W, W), heads)
    entering = contract("bgin,bgmn->bgim", C, initial_state.reshape(rows, G, -1, C.shape[-1]))
    entering = entering.reshape(rows, G, W, H // G, P).swapaxes(2, 3).reshape(rows, H, W, P)
    return (y + jnp.exp(S)[..., None] * entering).swapaxes(1, 2)
