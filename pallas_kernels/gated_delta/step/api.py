"""Public entry of the decode step of the gated delta rule."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import require, require_booleans, require_floats, require_shape
from pallas_kernels.slots import require_slots


def gated_delta_step(
    q: Float[Array, "B H dk"],
    k: Float[Array, "B H dk"],
    v: Float[Array, "B Hv dv"],
    g: Float[Array, "B Hv"],
    beta: Float[Array, "B Hv"],
    *,
    pool: Float32[Array, "S Hv dk dv"],
    slots: Int[Array, "B"] | None = None,
    live: Bool[Array, "B"] | None = None,
    fresh: Bool[Array, "B"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B Hv dv"], Float32[Array, "S Hv dk dv"]]:
    """:func:`pallas_kernels.gated_delta.gated_delta` of one token per row, whose state before it lies in a slot of a pool.

    ``S' = exp(g) S,  S_new = S' + k (beta (v - S'^T k))^T,  o = S_new^T q`` for each head, in float32 throughout. Source:
    Gated Delta Networks (arXiv 2412.06464). Hv/H consecutive value heads read one query and key head. Neither
    normalisation nor scale is applied: give q and k as they shall be multiplied.

    Args:
        q: queries.
        k: keys; of Euclidean length at most 1 where the recurrence shall not grow.
        v: values.
        g: log decays, at most 0.
        beta: strength of each write, in [0, 2].
        pool: the state of every slot. Donate it, else it is copied first.
        slots: the slot of each row, no slot twice; -1: the row is idle. None: row b has slot b.
        live: False where a row is idle: its values are never read, its slot stays as it is. None: all.
        fresh: True where a document begins: zeros stand for what its slot holds, which is not read. None: nowhere.
        implementation: "auto", "mosaic_gpu" (Hopper; dk a multiple of 8 and dv of 64, both from 64 to 256), "xla" or
            "reference".

    Returns:
        o in the dtype of v (0 in idle rows), and the pool with the states of these slots after the token.

    Raises:
        ValueError: a shape, a dtype or ``implementation`` is not as above, or H does not divide Hv.
    """
    require(q.ndim == 3, "q.shape", q.shape, "three dimensions [B, H, dk]")
    rows, H, dk = q.shape
    require_shape("k", k, q.shape, "B, H, dk")
    fits = v.ndim == 3 and len(v) == rows and H >= 1 and v.shape[1] % H == 0
    require(fits, "v.shape", v.shape, f"({rows}, Hv, dv) [B, Hv, dv], Hv a multiple of H = {H}")
    Hv, dv = v.shape[1:]
    require_shape("g", g, (rows, Hv), "B, Hv")
    require_shape("beta", beta, (rows, Hv), "B, Hv")
    require(pool.ndim == 4, "pool.shape", pool.shape, "four dimensions [S, Hv, dk, dv]")
    require_shape("pool", pool, (pool.shape[0], Hv, dk, dv), "S, Hv, dk, dv")
    require(pool.dtype == jnp.float32, "pool.dtype", pool.dtype.name, "float32")
    require_slots(slots, live, rows, pool)
    require_shape("fresh", fresh, (rows,), "B")
    require_floats(q=q, k=k, v=v, g=g, beta=beta)
    require_booleans(fresh=fresh)
    options = {"pool": pool, "slots": slots, "live": live, "fresh": fresh}
    module = dispatch.choose("gated_delta.step", implementation, q, k, v, g, beta, **options)
    return module.run(q, k, v, g, beta, **options)
