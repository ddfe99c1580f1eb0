"""Public entries: outputs of a tree of tokens, and the state after one of its paths."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import require, require_shape
from pallas_kernels.precision import contract


class Factors(NamedTuple):
    """What a window leaves behind instead of W states: float32, zeros at padding.

    Attributes:
        k: keys, f32[B, W, H, dk].
        write: what each node writes at its key, ``beta (v - S'^T k)``, f32[B, W, Hv, dv].
        decay: sum of the log decays on the path to each node, its own included, f32[B, W, Hv].
    """

    k: Any
    write: Any
    decay: Any


def gated_delta_window(
    q: Float[Array, "B W H dk"],
    k: Float[Array, "B W H dk"],
    v: Float[Array, "B W Hv dv"],
    g: Float[Array, "B W Hv"],
    beta: Float[Array, "B W Hv"],
    *,
    ancestors: Bool[Array, "B W W"],
    initial_state: Float[Array, "B Hv dk dv"],
    implementation: str = "auto",
) -> tuple[Float[Array, "B W Hv dv"], Factors]:
    """:func:`pallas_kernels.gated_delta.gated_delta` along the path to every node, without a state for any of them.

    A node's write depends on its ancestors' only, so the writes of all nodes solve one system: with ``G_i`` the sum of g
    on the path to i, ``w_i + beta_i sum_j exp(G_i - G_j) (k_i . k_j) w_j = beta_i (v_i - exp(G_i) S_0^T k_i)`` over the
    ancestors j of i. It is the WY form of a chunk (arXiv 2412.06464, section 3) with the causal mask replaced by the
    tree's. Everything is float32, as in a one-token call of ``gated_delta``.

    Args:
        q: queries.
        k: keys.
        v: values; Hv/H consecutive value heads read one query and key head.
        g: log decays, at most 0.
        beta: strength of each write, in [0, 2].
        ancestors: as :func:`pallas_kernels.tree.ancestors` gives it; the values of padding are never read.
        initial_state: state before the window.
        implementation: "auto", "xla" or "reference".

    Returns:
        o in the dtype of v, 0 at padding; and the factors from which :func:`gated_delta_commit` makes the state.

    Raises:
        ValueError: a shape or ``implementation`` is not as above, or H does not divide Hv.
    """
    require(q.ndim == 4, "q.shape", q.shape, "four dimensions [B, W, H, dk]")
    rows, W, H, dk = q.shape
    require_shape("k", k, q.shape, "B, W, H, dk")
    require(
        v.ndim == 4 and v.shape[:2] == (rows, W), "v.shape", v.shape, f"({rows}, {W}, Hv, dv) [B, W, Hv, dv]"
    )
    Hv, dv = v.shape[2:]
    require(Hv % H == 0, "v.shape", v.shape, f"Hv (third) to be a multiple of H = {H}")
    require_shape("g", g, (rows, W, Hv), "B, W, Hv")
    require_shape("beta", beta, (rows, W, Hv), "B, W, Hv")
    require_shape("ancestors", ancestors, (rows, W, W), "B, W, W")
    require_shape("initial_state", initial_state, (rows, Hv, dk, dv), "B, Hv, dk, dv")
    live, out_dtype = jnp.diagonal(ancestors, axis1=1, axis2=2), v.dtype
    q, k, v, g, beta = (
        jnp.where(live.reshape(rows, W, *[1] * (x.ndim - 2)), x.astype(jnp.float32), 0)
        for x in (q, k, v, g, beta)
    )
    options = {"ancestors": ancestors, "initial_state": initial_state.astype(jnp.float32)}
    module = dispatch.choose("gated_delta.window", implementation, q, k, v, g, beta, **options)
    o, write = module.run(q, k, v, g, beta, **options)
    decay = jnp.einsum("bij,bjh->bih", ancestors.astype(jnp.float32), g, precision="highest")
    return o.astype(out_dtype), Factors(k, write, decay)


def gated_delta_commit(
    factors: Factors, accepted: Bool[Array, "B W"], initial_state: Float[Array, "B Hv dk dv"]
) -> Float[Array, "B Hv dk dv"]:
    """The float32 state after one path of the window: ``exp(G_e) S_0 + sum_j exp(G_e - G_j) k_j w_j^T``.

    Args:
        factors: of :func:`gated_delta_window`.
        accepted: the nodes of the path: its last node e and all its ancestors. None of a row's: its state is kept
            bit by bit.
        initial_state: state before the window.

    Raises:
        ValueError: a shape is not as above.
    """
    rows, W, Hv, dv = factors.write.shape
    H, dk = factors.k.shape[2:]
    require_shape("accepted", accepted, (rows, W), "B, W")
    require_shape("initial_state", initial_state, (rows, Hv, dk, dv), "B, Hv, dk, dv")
    initial_state = initial_state.astype(jnp.float32)
    # Log decays are at most 0, so the path's last node has the least sum; no path: 0.
    last = jnp.min(jnp.where(accepted[..., None], factors.decay, 0), axis=1)
    share = jnp.exp(jnp.where(accepted[..., None], last[:, None] - factors.decay, -jnp.inf))
    weighted = (share[..., None] * factors.write).reshape(rows, W, H, Hv // H, dv)
    new = contract("bjhk,bjhev->bhekv", factors.k, weighted).reshape(initial_state.shape)
    new = jnp.exp(last)[..., None, None] * initial_state + new
    return jnp.where(jnp.any(accepted, axis=1)[:, None, None, None], new, initial_state)
