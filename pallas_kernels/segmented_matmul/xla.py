"""Rows sorted by slot, then adapter by adapter and block by block of its rows, both products at once.

As in the grouped product, the number of adapters that are run is dynamic: one without rows costs nothing, so a decode
step reads the factors of the adapters it needs and no others. The last block of an adapter may reach into the next one's
rows, which that one's own blocks overwrite. The shrunk rows of a block live in float32 and are made again for gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.permute import Plan, plan
from pallas_kernels.grouped_matmul.xla import block_rows, busy_experts

REASON = "a loop over adapters and blocks of their rows, sorted by slot"


def supports(*_args, **_options) -> str | None:
    return None


def by_slot(slots, S: int) -> Plan:
    """Rows sorted by slot; those of slot 0 and of no slot come last, where no adapter is run."""
    return plan(jnp.where((slots > 0) & (slots < S), slots, S)[:, None], S)


def _dot(spec, one, other):
    precision = None if one.dtype == other.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    if one.dtype != other.dtype:
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    return jnp.einsum(spec, one, other, precision=precision, preferred_element_type=jnp.float32)


def _sorted(rows, order, block, dtype):
    """Rows in the order of their slots, with room for a last block that reaches past the end."""
    return jnp.pad(rows.astype(dtype)[order], ((0, block), (0, 0)))


def unsorted(rows, p: Plan, dtype):
    """Rows back in their places; zeros where no adapter was run."""
    place = p.inverse[:, 0]
    return jnp.where((place < jnp.sum(p.sizes))[:, None], rows[place], 0).astype(dtype)


def _factors(a, b, slot, dtype):
    return tuple(lax.dynamic_index_in_dim(w, slot, keepdims=False).astype(dtype) for w in (a, b))


def _forward(x, a, b, scaling, slots, dtype):
    p = by_slot(slots, len(a))
    block = block_rows(len(x), len(a))
    busy = busy_experts(p.sizes)
    rows = _sorted(x, p.order, block, dtype)

    def adapter(i, y):
        slot = busy.expert[i]
        shrink, expand = _factors(a, b, slot, dtype)
        scale = scaling[slot].astype(jnp.float32)

        def step(j, y):
            first = busy.first[i] + j * block
            low = _dot("mk,kr->mr", lax.dynamic_slice_in_dim(rows, first, block), shrink)
            return lax.dynamic_update_slice_in_dim(y, scale * _dot("mr,rn->mn", low, expand), first, 0)

        return lax.fori_loop(0, -(-busy.rows[i] // block), step, y)

    start = jnp.zeros((len(rows), b.shape[2]), jnp.float32)
    y = unsorted(lax.fori_loop(0, busy.count, adapter, start), p, x.dtype)
    known = (slots >= 0) & (slots < len(a))
    return jnp.where(known[:, None], y, jnp.nan)


def _gradients(x, a, b, scaling, slots, g, dtype):
    """Of x (in order of slots, float32), a, b and scaling."""
    p = by_slot(slots, len(a))
    block = block_rows(len(x), len(a))
    busy = busy_experts(p.sizes)
    rows, cotangents = (_sorted(w, p.order, block, dtype) for w in (x, g))

    def adapter(i, carry):
        slot = busy.expert[i]
        shrink, expand = _factors(a, b, slot, dtype)
        scale = scaling[slot].astype(jnp.float32)

        def step(j, carry):
            dx, da, db, dscaling = carry
            first = busy.first[i] + j * block
            own = (j * block + jnp.arange(block) < busy.rows[i])[:, None]
            # Both are masked: zero times the NaN of a row that is not the adapter's would be NaN.
            mine, dy = (
                jnp.where(own, lax.dynamic_slice_in_dim(w, first, block), 0) for w in (rows, cotangents)
            )
            low, dlow = _dot("mk,kr->mr", mine, shrink), _dot("mn,rn->mr", dy, expand)
            dx = lax.dynamic_update_slice_in_dim(dx, scale * _dot("mr,kr->mk", dlow, shrink), first, 0)
            da, db = da + _dot("mk,mr->kr", mine, dlow), db + _dot("mr,mn->rn", low, dy)
            return dx, da, db, dscaling + jnp.sum(low * dlow)

        dx, *pools = carry
        start = [jnp.zeros(pool.shape[1:], jnp.float32) for pool in pools]
        dx, da, db, dscale = lax.fori_loop(0, -(-busy.rows[i] // block), step, (dx, *start))
        sums = (scale * da, scale * db, dscale)
        return dx, *(
            lax.dynamic_update_index_in_dim(pool, total.astype(pool.dtype), slot, 0)
            for pool, total in zip(pools, sums, strict=True)
        )

    start = (jnp.zeros((len(rows), x.shape[1]), jnp.float32), *(jnp.zeros_like(w) for w in (a, b, scaling)))
    dx, *pools = lax.fori_loop(0, busy.count, adapter, start)
    return dx, p, pools


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _segmented(x, a, b, scaling, slots, dtype):
    return _forward(x, a, b, scaling, slots, dtype)


def _segmented_fwd(x, a, b, scaling, slots, dtype):
    y = _forward(x, a, b, scaling, slots, dtype)
    # A zero-size array remembers the dtype of x, so that only the rounded rows are kept for backward.
    return y, (x.astype(dtype), a, b, scaling, slots, jnp.zeros((0,), x.dtype))


def _segmented_bwd(dtype, residuals, g):
    x, a, b, scaling, slots, x_like = residuals
    dx, p, pools = _gradients(x, a, b, scaling, slots, g, dtype)
    return unsorted(dx, p, x_like.dtype), *pools, None


_segmented.defvjp(_segmented_fwd, _segmented_bwd)


def run(x, a, b, scaling, slots, *, operand_dtype):
    slots = slots.astype(jnp.int32)
    return _segmented(x, a, b, scaling, slots, jnp.dtype(operand_dtype or x.dtype))
