"""The grouped product block by block: each block of rows has one expert, whose weights are read as one slice.

The number of blocks that are run is dynamic: an expert without rows costs nothing, so a decode step reads the weights
of the experts it needs and no others. ``jax.lax.ragged_dot`` multiplies every row with every expert on CPU and on CUDA.

Blocks lie in the sorted rows themselves. The last block of an expert may reach into the next one's rows: what it writes
there is overwritten by that one's own blocks, which come later. A batched product of blocks with gathered weights was
2 to 3 times slower on CPU, for the gather writes a copy of the weights per block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

REASON = "a loop over blocks of one expert each"

_MIN_BLOCK, _MAX_BLOCK = 8, 64


def supports(*_args, **_options) -> str | None:
    return None


def block_rows(rows: int, experts: int) -> int:
    """Rows of a block: half of an expert's share, where a block's padding and its re-reading of weights balance."""
    share = rows // (2 * experts)
    return min(_MAX_BLOCK, max(_MIN_BLOCK, 1 << share.bit_length() - 1 if share else 1))


class Blocks(NamedTuple):
    """Where the blocks lie: i32[n] expert, first row, and end of the expert's rows; i32[] how many there are."""

    expert: jax.Array
    first: jax.Array
    end: jax.Array
    count: jax.Array


def block_table(sizes: jax.Array, rows: int, block: int) -> Blocks:
    """The blocks of all experts in the order of their rows; at most min(rows, rows // block + E)."""
    n = min(rows, rows // block + len(sizes))
    ends, per_expert = jnp.cumsum(sizes), -(-sizes // block)
    last = jnp.cumsum(per_expert)
    index = jnp.arange(n, dtype=jnp.int32)
    expert = jnp.sum(last <= index[:, None], axis=1)
    # Entries past the count are never run.
    expert = jnp.minimum(expert, len(sizes) - 1)
    first = (ends - sizes)[expert] + (index - (last - per_expert)[expert]) * block
    return Blocks(expert, first, ends[expert], jnp.minimum(last[-1], n))


def _dot(spec, a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _padded(x, block, dtype):
    """``x`` with room for a last block that reaches past the end."""
    return jnp.pad(x.astype(dtype), ((0, block), (0, 0)))


def _rows(x, w, sizes, spec, dtype, out_dtype):
    """``spec`` of each block of x and its expert's w; zeros past the last expert's rows."""
    M, block = x.shape[0], block_rows(x.shape[0], len(w))
    table = block_table(sizes, M, block)
    x = _padded(x, block, dtype)
    N = w.shape[2] if spec.endswith("bn") else w.shape[1]

    def step(i, y):
        rows = lax.dynamic_slice_in_dim(x, table.first[i], block)
        weights = lax.dynamic_index_in_dim(w, table.expert[i], keepdims=False).astype(dtype)
        out = _dot(spec, rows, weights).astype(out_dtype)
        return lax.dynamic_update_slice_in_dim(y, out, table.first[i], 0)

    y = lax.fori_loop(0, table.count, step, jnp.zeros((M + block, N), out_dtype))
    return jnp.where(jnp.arange(M)[:, None] < jnp.sum(sizes), y[:M], 0)


def _weights(x, g, sizes, dtype, out_dtype):
    """Per expert the product of its rows of x and g: [E, K, N], float32 sums."""
    M, E = x.shape[0], len(sizes)
    block = block_rows(M, E)
    table = block_table(sizes, M, block)
    x, g = (_padded(v, block, dtype) for v in (x, g))

    def step(i, dw):
        first, e = table.first[i], table.expert[i]
        own = (first + jnp.arange(block) < table.end[i])[:, None]
        # Both are masked: zero times the NaN of a row that is not the expert's would be NaN.
        rows = [jnp.where(own, lax.dynamic_slice_in_dim(v, first, block), 0) for v in (x, g)]
        total = lax.dynamic_index_in_dim(dw, e, keepdims=False) + _dot("bk,bn->kn", *rows)
        return lax.dynamic_update_index_in_dim(dw, total, e, 0)

    start = jnp.zeros((E, x.shape[1], g.shape[1]), jnp.float32)
    return lax.fori_loop(0, table.count, step, start).astype(out_dtype)


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
