"""The step on Hopper GPUs through Mosaic: a slot's window read once and written back in place, nothing gathered."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.causal_conv.mosaic_gpu import refusal
from pallas_kernels.causal_conv.mosaic_rows import Plan, compiler_params, sigmoid, weighted
from pallas_kernels.causal_conv.tiles import Tiles
from pallas_kernels.slots import slot_ids
from pallas_kernels.tiles import tiles

REASON = "windows read and written in place, once each"
BESIDE = "nothing, where the pool is donated"


def supports(x, weight, _bias, **_options) -> str | None:
    return refusal(x, weight.shape[0], 8)


def run(x, weight, bias, *, pool, slots, live, activation):
    B, D = x.shape
    pl = compat.pl
    plan = Plan.of(x[:, None], weight.shape[0], tiles("causal_conv.step", "step", Tiles(rows=8, unroll=1)))

    def kernel(given, pool_ref, out):
        x_ref, weight_ref, bias_ref, slots_ref = given
        b, columns = lax.axis_index("row"), pl.ds(lax.axis_index("column") * plan.columns, plan.columns)
        slot = slots_ref[b]
        at = jnp.clip(slot, 0, pool_ref.shape[0] - 1)
        window = plan.far_rows(pool_ref.at[at], columns)
        taps = [*window, jnp.where(slot >= 0, plan.far(x_ref.at[b, columns]), 0.0)]
        bias_row = None if bias_ref is None else plan.far(bias_ref.at[columns])
        y = weighted(plan.far_rows(weight_ref, columns), taps, bias_row)
        y = y * sigmoid(y) if activation == "silu" else y
        out[b, columns] = jnp.where(slot >= 0, y, 0.0).astype(x.dtype)

        @pl.when(slot >= 0)
        def _move_on():
            for j, tap in enumerate(taps[1:]):
                pool_ref[at, j, columns] = tap.astype(pool.dtype)

    return compat.mosaic_in_place(
        kernel,
        (x, weight, bias, slot_ids(slots, live, B)),
        pool,
        name="causal_conv_step",
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(D // plan.columns, B),
        grid_names=("column", "row"),
        compiler_params=compiler_params(),
    )
