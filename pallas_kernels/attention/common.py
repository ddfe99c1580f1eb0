"""What the Mosaic GPU kernels of attention share: scores, masks, and how arrays come into shared memory."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.attention.blocks import Places
from pallas_kernels.mosaic import cast_layout, load, mma

# Warpgroups that compute; one more fetches.
CONSUMERS = 2
# Rows of one warpgroup: the M of one WGMMA.
ROWS = 64
LOG2E = math.log2(math.e)
# Below every score that counts, and finite, so that no difference of two of them is NaN.
LEAST = float(jnp.finfo(jnp.float32).min) / 2


def compiler_params() -> Any:
    """Layouts are written out here; the default of later versions infers them."""
    plgpu = compat.plgpu
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def matrices(shape: tuple[int, ...], dtype: Any, *, like: int | None = None) -> Any:
    """Shared memory for matrices [..., rows, columns], laid out as WGMMA and the copy engine want them.

    ``like``: laid out as matrices of so many columns are, which these are multiplied with.
    """
    plgpu, bits = compat.plgpu, jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle((like or shape[-1]) * bits)
    transforms = (plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def full(shape: tuple[int, ...], value: float, layout: Any, dtype: Any = jnp.float32) -> jax.Array:
    """A constant in registers of this layout."""
    return cast_layout(jnp.full(shape, value, dtype), layout)


def capped(scores: jax.Array, scale: float, soft_cap: float | None) -> jax.Array:
    """Scaled and soft-capped scores in units of log 2; tanh by its exponential, whose hardware form is exact enough."""
    if soft_cap is None:
        return scores * (scale * LOG2E)
    grown = jnp.exp2(scores * (2 * LOG2E * scale / soft_cap))
    return (soft_cap * LOG2E) - (2 * soft_cap * LOG2E) / (grown + 1.0)


def hide(
    values: jax.Array, hidden: float, queries: Any, keys: Any, window: int | None, q_axis: int
) -> jax.Array:
    """``values`` of a tile with ``hidden`` at the pairs that are not visible.

    One selection after the other: a mask put together first would take registers of its own.

    Args:
        queries: functions that give the ids, the positions and the words of a mask along ``q_axis`` of the tile, when
            they are needed.
        keys: the same along the other axis.
    """

    def along(part, axis):
        return lax.broadcast_in_dim(part(), values.shape, (axis,))

    kv_axis = 1 - q_axis
    values = jnp.where(along(queries[0], q_axis) == along(keys[0], kv_axis), values, hidden)
    at, key_at = along(queries[1], q_axis), along(keys[1], kv_axis)
    values = jnp.where(key_at <= at, values, hidden)
    if window is not None:
        values = jnp.where(at - key_at < window, values, hidden)
    shared = None
    for held, owned in zip(queries[2:], keys[2:], strict=True):
        both = along(held, q_axis) & along(owned, kv_axis)
        shared = both if shared is None else shared | both
    return values if shared is None else jnp.where(shared != 0, values, hidden)


def now(ref: Any, layout: Any) -> tuple[Callable[[], jax.Array], ...]:
    """The rows of ``ref``, as :func:`hide` takes them, read once and kept in registers."""
    rows = [load(ref.at[n], layout) for n in range(ref.shape[0])]
    return tuple(partial(lambda row: row, row) for row in rows)


def when_needed(ref: Any, layout: Any) -> tuple[Callable[[], jax.Array], ...]:
    """The rows of ``ref``, as :func:`hide` takes them, each read where it is used."""
    return tuple(partial(load, ref.at[n], layout) for n in range(ref.shape[0]))


def rows_of(x: Array, axis: int, block: int) -> Array:
    """``x`` as the copy engine can read whole blocks of it along ``axis``.

    The engine fills what lies past the end with zeros, but counts rows in eights. The interpreter has no such fill.
    """
    length = x.shape[axis]
    if length >= block and length % 8 == 0 and not (compat.interpreting() and length % block):
        return x
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, -length % block)
    return jnp.pad(x, fill)


def meta(places: Places) -> Int[Array, "B m L"]:
    """i32[B, m, L]: ids, positions and the words of a mask, one copy for all."""
    rows = jnp.stack([places.ids, places.positions], axis=1)
    return rows if places.words is None else jnp.concatenate([rows, places.words], axis=1)


def key_rows(ref: Any, b: Any, rows: Any, head: Any, kv_layout: str, columns: Any = slice(None)) -> Any:
    """Rows of one head of keys or values in either layout."""
    return ref.at[b, rows, head, columns] if kv_layout == "BTKD" else ref.at[b, head, rows, columns]


def product(left: Any, right: Any) -> jax.Array:
    """``left right^T`` in float32 of matrices [parts, rows, columns] in shared memory."""
    out = None
    for n in range(left.shape[0]):
        out = mma(out, left.at[n], right.at[n], transpose_b=True)
    assert out is not None
    return out


def slopes(scores: jax.Array, soft_cap: float | None) -> jax.Array | float:
    """Derivative of the soft cap where it gave ``scores``, those in units of log 2."""
    if soft_cap is None:
        return 1.0
    bent = scores * (1.0 / (soft_cap * LOG2E))
    return 1.0 - bent * bent


def statistics(
    out: Float[Array, "B T H d"],
    lse: Float[Array, "B T H"],
    dout: Float[Array, "B T H d"],
    dlse: Float[Array, "B T H"] | None,
) -> Float[Array, "B H 2 T"]:
    """Per query: lse in units of log 2, and what is taken off each weight's gradient (dout . out - dlse)."""
    shift = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    shift = shift if dlse is None else shift - dlse
    # A row that sees nothing has no weights: any finite log of their sum will do.
    pair = jnp.stack([jnp.where(lse == -jnp.inf, 0, lse) * LOG2E, shift], axis=1)
    return jnp.moveaxis(pair, 3, 1)


def filled(stats: Float[Array, "B H 2 T"], queries: Places) -> Float[Array, "B H 2 L"]:
    return jnp.pad(stats, ((0, 0), (0, 0), (0, 0), (0, queries.ids.shape[1] - stats.shape[3])))
