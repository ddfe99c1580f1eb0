"""Public entries: outputs of a tree of tokens, and the state after one of its paths."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.arguments import require_booleans, require_floats, require_shape
from pallas_kernels.gated_delta.checks import require_inputs
from pallas_kernels.precision import contract
from pallas_kernels.tree import live_values, path_sums, state_after


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
        ValueError: a shape, a dtype or ``implementation`` is not as above, or H does not divide Hv.
    """
    require_inputs(q, k, v, g, beta, "W")
    rows, W, _, dk = q.shape
    Hv, dv = v.shape[2:]
    require_shape("ancestors", ancestors, (rows, W, W), "B, W, W")
    require_booleans(ancestors=ancestors)
    require_floats(initial_state=initial_state)
    require_shape("initial_state", initial_state, (rows, Hv, dk, dv), "B, Hv, dk, dv")
    out_dtype = v.dtype
    q, k, v, g, beta = live_values(ancestors, q, k, v, g, beta)
    options = {"ancestors": ancestors, "initial_state": initial_state.astype(jnp.float32)}
    module = dispatch.choose("gated_delta.window", implementation, q, k, v, g, beta, **options)
    o, write = module.run(q, k, v, g, beta, **options)
    return o.astype(out_dtype), Factors(k, write, path_sums(ancestors, g))


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

    def written(weights: Array) -> Array:
        weighted = (weights[..., None] * factors.write).reshape(rows, W, H, Hv // H, dv)
        return contract("bjhk,bjhev->bhekv", factors.k, weighted).reshape(initial_state.shape)

    return state_after(factors.decay, accepted, initial_state, written)
