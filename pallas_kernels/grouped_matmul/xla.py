"""The grouped product expert by expert, and block by block of its rows: an expert's weights are read as one slice, once.

The number of experts that are run is dynamic: one without rows costs nothing, so a decode step reads the weights of the
experts it needs and no others. ``jax.lax.ragged_dot`` multiplies every row with every expert on CPU and on CUDA.

Blocks lie in the sorted rows themselves. The last block of an expert may reach into the next one's rows: what it writes
there is overwritten by that one's own blocks, which come later. One loop over all blocks copied the weights, and in the
gradient their sum, once per block: on CPU 1.1 to 1.5 times as long. A batched product of blocks with gathered weights was
2 to 3 times slower still, for the gather writes a copy of the weights per block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

REASON = "a loop over experts and blocks of their rows"

_MIN_BLOCK, _MAX_BLOCK = 8, 128


def supports(*_args, **_options) -> str | None:
    return None


def block_rows(rows: int, experts: int) -> int:
    """Rows of a block: at most an expert's share. Larger ones are padding, smaller ones slow products."""
    share = rows // experts
    return min(_MAX_BLOCK, max(_MIN_BLOCK, 1 << share.bit_length() - 1 if share else 1))


class Busy(NamedTuple):
    """Experts that have rows, in order: i32[E] expert, its first row, its rows; i32[] how many there are."""

    expert: jax.Array
    first: jax.Array
    rows: jax.Array
    count: jax.Array


def busy_experts(sizes: jax.Array) -> Busy:
    """The experts that have rows; entries past the count are of those that have none."""
    expert = jnp.argsort(sizes == 0, stable=True)
    first = jnp.cumsum(sizes) - sizes
    return Busy(expert, first[expert], sizes[expert], jnp.sum(sizes > 0))


def _dot(spec, a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _padded(x, block, dtype):
    """``x`` with room for a last block that reaches past the end."""
    return jnp.pad(x.astype(dtype), ((0, block), (0, 0)))


def _rows(x, w, sizes, spec, dtype, out_dtype):
    """``spec`` of each block of x and its expert's w; zeros past the last expert's rows."""
    M, block = x.shape[0], block_rows(x.shape[0], len(w))
    busy = busy_experts(sizes)
    x = _padded(x, block, dtype)
    N = w.shape[2] if spec.endswith("bn") else w.shape[1]

    def expert(i, y):
        weights = lax.dynamic_index_in_dim(w, busy.expert[i], keepdims=False).astype(dtype)

        def step(j, y):
            first = busy.first[i] + j * block
            out = _dot(spec, lax.dynamic_slice_in_dim(x, first, block), weights).astype(out_dtype)
            return lax.dynamic_update_slice_in_dim(y, out, first, 0)

        return lax.fori_loop(0, -(-busy.rows[i] // block), step, y)

    y = lax.fori_loop(0, busy.count, expert, jnp.zeros((M + block, N), out_dtype))
    return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes), y[:M], 0)


def _weights(x, g, sizes, dtype, out_dtype):
    """Per expert the product of its rows of x and g: [E, K, N], float32 sums."""
    M, E = x.shape[0], len(sizes)
    block = block_rows(M, E)
    busy = busy_experts(sizes)
    x, g = (_padded(v, block, dtype) for v in (x, g))

    def expert(i, dw):
        def step(j, total):
            own = (j * block + jnp.arange(block) < busy.rows[i])[:, None]
            first = busy.first[i] + j * block
            # Both are masked: zero times the NaN of a row that is not the expert's would be NaN.
            rows = [jnp.where(own, lax.dynamic_slice_in_dim(v, first, block), 0) for v in (x, g)]
            return total + _dot("bk,bn->kn", *rows)

        start = jnp.zeros((x.shape[1], g.shape[1]), jnp.float32)
        total = lax.fori_loop(0, -(-busy.rows[i] // block), step, start)
        return lax.dynamic_update_index_in_dim(dw, total.astype(out_dtype), busy.expert[i], 0)

    start = jnp.zeros((E, x.shape[1], g.shape[1]), out_dtype)
    return lax.fori_loop(0, busy.count, expert, start)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x, w, sizes, dtype, out_dtype):
    return _rows(x, w, sizes, "bk,kn->bn", dtype, out_dtype)


def _grouped_fwd(x, w, sizes, dtype, out_dtype):
    kept = x.astype(dtype)
    # A zero-size array remembers the dtype of x, so that only the rounded rows are kept for backward.
    return _grouped(kept, w, sizes, dtype, out_dtype), (kept, w, sizes, jnp.zeros((0,), x.dtype))


def _grouped_bwd(dtype, out_dtype, residuals, g):
    x, w, sizes, x_like = residuals
    dx = _rows(g, w, sizes, "bn,kn->bk", dtype, x_like.dtype)
    return dx, _weights(x, g, sizes, dtype, w.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def run(x, w, sizes, *, operand_dtype):
    return _grouped(x, w, sizes.astype(jnp.int32), jnp.dtype(operand_dtype or x.dtype), x.dtype)
