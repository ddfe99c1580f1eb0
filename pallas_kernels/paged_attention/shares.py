"""What stands around the GPU kernels: queries laid out for them, and shares of the keys merged with the open tail.

The merge is not in the kernels: shares are at most about twice as many as the multiprocessors, or one for each row, head
and block of query rows, and of live query rows only, which is under 1 % of the bytes of the keys from a few thousand
tokens on. A fused merge would wait for the last share by counters in memory, which no interpreter proves; the tail is a
handful of tokens that XLA fuses with the merge.
"""

import jax.numpy as jnp

from pallas_kernels.attention.merge import merge
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.options import Options, Reads
from pallas_kernels.paged_attention.pools import Pool

_MULTIPROCESSORS = 132


def splits(asked: int, others: int, steps: int) -> int:
    """Shares of a row's keys: as asked, or (0) such that ``others`` programs each fill the device twice."""
    return asked or max(1, min(-(-2 * _MULTIPROCESSORS // others), steps))


def padded(x, size: int, axis: int, value=0):
    """``x`` with ``value`` up to ``size`` entries of ``axis``."""
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, fill, constant_values=value)


def blocked(x, blocks: int, size: int, axis: int, value=0):
    """``axis`` of ``x``, padded with ``value``, as two: [..., blocks, size, ...]."""
    x = padded(x, blocks * size, axis, value)
    return x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])


def rows_of(q, K: int):
    """[B, K, W * G, d], a query's group of heads together."""
    B, W, H, d = q.shape
    return q.reshape(B, W, K, H // K, d).swapaxes(1, 2).reshape(B, K, -1, d)


def operands(rows, keys: Pool, high: float = 1.0):
    """Queries bf16[parts, ..., d / parts] for the parts of the keys, and the sums f32[...] of all their channels.

    ``high``: how much too large the second part of four-bit codes is read.
    """
    halves = jnp.split(rows, keys.parts, axis=-1)
    if keys.bits == 4 and keys.kind == "token":
        halves[1] = halves[1] * jnp.asarray(1 / high, rows.dtype)
    return jnp.stack(halves), jnp.sum(rows.astype(jnp.float32), axis=-1)


def combined(out, lse):
    """One output [B, K, m, d] and lse [B, K, m] of all shares of the keys; ``out`` in parts of the channels."""
    peak = jnp.max(lse, axis=2, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weight = jnp.exp(lse - peak)
    total = jnp.sum(weight, axis=2)
    mean = jnp.sum(weight[..., None] * out, axis=3) / jnp.where(total > 0, total, 1)[..., None]
    return jnp.concatenate(list(mean), axis=-1), peak[:, :, 0] + jnp.log(total)


def of_scores(options: Options):
    """What a kernel is told of the scores."""
    return {"scale": options.scale, "soft_cap": options.soft_cap, "window": options.window}


def finished(q, K, out, lse, reads: Reads, options: Options, mass_of):
    """What ``paged_attention`` returns, from the shares ``out`` and ``lse`` of a kernel.

    ``mass_of`` gives, from the final finite log-sum-exps f32[B, K, W * G], the sums f32[B, K, n, p] of the sealed keys'
    probabilities over the query rows; it is asked where mass is wanted.
    """
    B, W, H, _ = q.shape
    live = W * (H // K)
    out, lse = combined(out[..., :live, :], lse[..., :live])
    part, q_positions = None, reads.q_positions
    if reads.tail is not None:
        rows = xla.grouped_rows(q, K, options.scale)
        narrow = jnp.dtype(jnp.bfloat16)
        part = xla.tail_part(rows, reads.tail, q_positions, options.window, options.soft_cap, narrow)
        out, lse = merge((out, lse), part[:2])
    mass = None
    if options.return_mass:
        share = xla.mean_share(q_positions, H // K)
        sealed = mass_of(jnp.where(lse == -jnp.inf, 0, lse)) * share[..., None]
        mass = (sealed, jnp.zeros((B, K, 0)) if part is None else xla.mean_mass(part[2], part[1], lse, share))
    return xla.ungrouped(out, W).astype(q.dtype), xla.ungrouped(lse, W), mass
