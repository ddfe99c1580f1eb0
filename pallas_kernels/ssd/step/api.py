"""Public entry of the decode step of SSD."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import require, require_booleans, require_floats, require_shape
from pallas_kernels.slots import require_slots


def ssd_step(
    x: Float[Array, "B H P"],
    dt: Float[Array, "B H"],
    A: Float[Array, "H"],
    B: Float[Array, "B G N"],
    C: Float[Array, "B G N"],
    D: Float[Array, "H"] | None = None,
    *,
    pool: Float32[Array, "S H P N"],
    slots: Int[Array, "B"] | None = None,
    live: Bool[Array, "B"] | None = None,
    fresh: Bool[Array, "B"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B H P"], Float32[Array, "S H P N"]]:
    """:func:`pallas_kernels.ssd.ssd` of one token per row, whose state before it lies in a slot of a pool.

    ``S' = exp(dt A) S + dt x B^T,  y = S' C + D x`` for each head, in float32 throughout. Source: Mamba-2
    (arXiv 2405.21060). H/G consecutive heads share a group's B and C.

    Args:
        x: inputs.
        dt: step sizes, at least 0, already biased, softplus-ed and clamped.
        A: decay rates, at most 0.
        B: input projections.
        C: output projections.
        D: weight of the skip connection; None for none.
        pool: the state of every slot. Donate it, else it is copied first.
        slots: the slot of each row, no slot twice; -1: the row is idle. None: row b has slot b.
        live: False where a row is idle: its values are never read, its slot stays as it is. None: all.
        fresh: True where a document begins: zeros stand for what its slot holds, which is not read. None: nowhere.
        implementation: "auto", "mosaic_gpu" (Hopper; P a multiple of 64, N of 64, 128 or 256), "xla" or "reference".

    Returns:
        y in the dtype of x (0 in idle rows), and the pool with the states of these slots after the token.

    Raises:
        ValueError: a shape, a dtype or ``implementation`` is not as above, or G does not divide H.
    """
    require(x.ndim == 3, "x.shape", x.shape, "three dimensions [B, H, P]")
    rows, H, P = x.shape
    require_shape("dt", dt, (rows, H), "B, H")
    require_shape("A", A, (H,), "H")
    fits = B.ndim == 3 and len(B) == rows and B.shape[1] >= 1 and H % B.shape[1] == 0
    require(fits, "B.shape", B.shape, f"({rows}, G, N) [B, G, N], G a divisor of H = {H}")
    require_shape("C", C, B.shape, "B, G, N")
    require_shape("D", D, (H,), "H")
    require(pool.ndim == 4, "pool.shape", pool.shape, "four dimensions [S, H, P, N]")
    require_shape("pool", pool, (pool.shape[0], H, P, B.shape[2]), "S, H, P, N")
    require(pool.dtype == jnp.float32, "pool.dtype", pool.dtype.name, "float32")
    require_slots(slots, live, rows, pool)
    require_shape("fresh", fresh, (rows,), "B")
    require_floats(x=x, dt=dt, A=A, B=B, C=C, D=D)
    require_booleans(fresh=fresh)
    options = {"pool": pool, "slots": slots, "live": live, "fresh": fresh}
    module = dispatch.choose("ssd.step", implementation, x, dt, A, B, C, D, **options)
    return module.run(x, dt, A, B, C, D, **options)
