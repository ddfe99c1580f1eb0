"""Backward kernel of the convolutions: down the tokens for the gradient before the activation, then up again for the inputs'.

Each warpgroup finishes its own tokens alone: it computes the k-1 gradients after them once more, which saves an exchange
between blocks. Sums over tokens leave it as one share per block, which XLA adds up in a fixed order.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.causal_conv.mosaic_rows import (
    Operands,
    Plan,
    Row,
    Window,
    compiler_params,
    sigmoid,
    slide,
    weighted,
)
from pallas_kernels.causal_conv.tiles import Tiles


class Gradients(NamedTuple):
    """What a call's inputs get, unmentioned ones None.

    Attributes:
        x: [B, T, D] in the dtype of x.
        weight: f32[B, blocks, k, D], shares of the sum; or [B, T, k, D] in its dtype, one for every token.
        bias: f32[B, blocks, D], shares of the sum.
        state: f32[B, n, k-1, D]; documents that do not occur are not written.
    """

    x: Float[Array, "B T D"]
    weight: Float[Array, "B _ k D"]
    bias: Float[Array, "B _ D"] | None
    state: Float[Array, "B n k-1 D"] | None


def backward(
    given: Operands, dy: Float[Array, "B T D"], *, activation: str | None, tiles: Tiles, name: str
) -> Gradients:
    """Gradients of the outputs' cotangents ``dy``, which count on tokens of documents only."""
    pl, plgpu = compat.pl, compat.plgpu
    (B, T, D), dtype = given.x.shape, given.x.dtype
    plan = Plan.of(given.x, given.weight.shape[-2], tiles)
    k, reach, rows = plan.taps, plan.reach, plan.rows
    # The rows whose gradients before the activation the block's own inputs need.
    ahead = rows + reach
    dynamic = given.weight.ndim == 4
    x, dy = plan.readable(given.x, reach), plan.readable(dy.astype(dtype), reach)
    weight = plan.readable(given.weight, reach) if dynamic else given.weight
    operands = given._replace(x=x, weight=weight, ids=plan.read_ids(given.ids))

    def kernel(refs: Operands, dy_ref, dx, dweight, dbias, dstate, x_tile, dy_tile, slopes, kernels, ready):
        b, i, c = (lax.axis_index(axis) for axis in ("row", "block", "column"))
        first, columns = i * rows, pl.ds(c * plan.columns, plan.columns)
        own = pl.ds(first, ahead)
        plgpu.copy_gmem_to_smem(refs.x.at[b, own, columns], x_tile.at[pl.ds(reach, ahead)], ready)
        before = pl.ds(jnp.maximum(first - reach, 0), reach)
        plgpu.copy_gmem_to_smem(refs.x.at[b, before, columns], x_tile.at[pl.ds(0, reach)], ready)
        plgpu.copy_gmem_to_smem(dy_ref.at[b, own, columns], dy_tile, ready)
        if dynamic:
            plgpu.copy_gmem_to_smem(refs.weight.at[b, own, :, columns], kernels, ready)
        weights = [] if dynamic else plan.far_rows(refs.weight, columns)
        bias = None if refs.bias is None else plan.far(refs.bias.at[columns])
        plgpu.barrier_wait(ready)

        def document(r):
            return plan.document(refs.ids, b, first + r)

        def kernel_of(r) -> list[Row]:
            return [plan.shared(kernels.at[r, j]) for j in range(k)] if dynamic else weights

        def advance(r, window):
            s = document(r)
            u = plan.shared(x_tile.at[r + reach])
            taps, window = slide(window, u, s, lambda: plan.opening(refs.state, b, s, columns))
            return s, taps, window

        def slope(r, window):
            """The gradient before the activation of row ``r``, and its taps."""
            s, taps, window = advance(r, window)
            g = plan.shared(dy_tile.at[r])
            if activation == "silu":
                y = weighted(kernel_of(r), taps, bias)
                share = sigmoid(y)
                g = g * (share * (1.0 + y * (1.0 - share)))
            # Of padding, nothing counts, whatever stands there.
            g = jnp.where(s > 0, g, 0.0)
            slopes[r] = g
            return g, taps, window

        def down(r, carry):
            window, sums = carry
            g, taps, window = slope(r, window)
            if dynamic:
                # The rows after the last one are nobody's.
                @pl.when(first + r < T)
                def _():
                    for j, tap in enumerate(taps):
                        dweight[b, first + r, j, columns] = (g * tap).astype(given.weight.dtype)
            else:
                sums = [total + g * tap for total, tap in zip(sums[:k], taps, strict=True)] + [
                    total + g for total in sums[k:]
                ]
            return window, sums

        window = Window((plan.zero(),) * reach, jnp.int32(0))
        window = lax.fori_loop(-reach, 0, lambda r, w: advance(r, w)[2], window)
        sums = [plan.zero()] * ((0 if dynamic else k) + (bias is not None))
        window, sums = lax.fori_loop(0, rows, down, (window, sums), unroll=plan.unroll)
        lax.fori_loop(rows, ahead, lambda r, w: slope(r, w)[2], window)
        for j, total in enumerate(sums[: 0 if dynamic else k]):
            dweight[b, i, j, columns] = total
        if bias is not None:
            dbias[b, i, columns] = sums[-1]

        def up(n, carry):
            """Row by row upwards; ``owed`` is what the rows after it add to the row, the one before it, ...."""
            owed, after = carry
            r = ahead - 1 - n
            s = document(r)
            owed = lax.cond(s == after, lambda: tuple(owed), lambda: (plan.zero(),) * reach)
            g = plan.shared(slopes.at[r])
            parts = [jnp.where(s > 0, w * g, 0.0) for w in reversed(kernel_of(r))]
            du = parts[0] + owed[0]
            owed = [
                *(part + debt for part, debt in zip(parts[1:-1], owed[1:], strict=True)),
                parts[-1],
            ]

            # Into the place of the input, which nothing reads any more.
            x_tile[r + reach] = du.astype(dtype)
            if dstate is not None:
                opens = (s > 0) & (r < rows) & (document(r - 1) != s)
                index = jnp.clip(s - 1, 0, dstate.shape[1] - 1)

                @pl.when(opens)
                def _():
                    for j in range(reach):
                        dstate[b, index, reach - 1 - j, columns] = owed[j]

            return tuple(owed), s

        lax.fori_loop(0, ahead, up, ((plan.zero(),) * reach, jnp.int32(0)))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_tile.at[pl.ds(reach, rows)], dx.at[b, pl.ds(first, rows), columns])
        plgpu.wait_smem_to_gmem(0)

    def some(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    out_type = (
        some(x.shape, dtype),
        some((B, T, k, D), given.weight.dtype) if dynamic else some((B, plan.blocks, k, D)),
        None if given.bias is None else some((B, plan.blocks, D)),
        None if given.state is None else some(given.state.shape),
    )
    found: Any = compat.mosaic_kernel(
        kernel,
        name=name,
        out_type=out_type,
        grid=(D // plan.columns, plan.blocks, B),
        grid_names=("column", "block", "row"),
        scratch_types=(
            plgpu.SMEM((reach + ahead, plan.columns), dtype),
            plgpu.SMEM((ahead, plan.columns), dtype),
            plgpu.SMEM((ahead, plan.columns), jnp.float32),
            plgpu.SMEM((ahead, k, plan.columns) if dynamic else (1,), given.weight.dtype),
            plgpu.Barrier(num_arrivals=4 if dynamic else 3),
        ),
        compiler_params=compiler_params(),
    )(operands, dy)
    return Gradients(found[0][:, :T], *found[1:])
