"""The Hopper kernel of paged attention: one query tile of 64 rows per CTA, over one share of a row's pages.

A producer warpgroup looks pages up in the table and brings them to a ring in shared memory, several pages to a tile of
keys; a consumer warpgroup multiplies and keeps the softmax in registers. Codes are turned into bfloat16 on the way from
the ring to the operands of WGMMA (they are exact there); the scales and offsets of tokens move to the scores and the
probabilities. Four-bit codes make two operands, the two halves of the channels; the high one is not shifted down, its
factor of 16 is taken out where it is cheap.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, mosaic

ROWS = 64
KEYS = 64
LOG2E = math.log2(math.e)
# Finite, so that the difference of two peaks is a number before anything was seen.
_NOTHING = -1e30
_LOW, _HIGH = 15, 240


@dataclass(frozen=True)
class Tiles:
    """stages: tiles of keys in flight; splits: shares of a row's keys, 0 for as many as fill the device twice."""

    stages: int = 4
    splits: int = 0

    def candidates(self) -> list["Tiles"]:
        """What the tuner tries."""
        return [Tiles(stages) for stages in (2, 3, 4, 5)]


@dataclass(frozen=True)
class Operands:
    """Arrays of one launch.

    Attributes:
        q: bf16[parts, B, K, m, d / parts], m a multiple of 64; parts: 2 for 4 bits, else 1.
        pools: keys and values, bf16[P, K, page, d] or codes as in QuantizedPages.
        scales: four float[P, K, page]: scale and offset of keys, of values; empty for plain pools.
        sums: f32[B, K, m], sum of each query's channels; None for plain pools.
        table: i32[B, K, n], within the pool, n page a multiple of 64.
        spans: i32[B, K], tiles of keys to read.
        lengths: i32[B, K], sealed tokens.
        positions: i32[B, m], position of each query row; -1 for padding.
        tokens: i32[B, K, n page], logical token of each key, -1 for none; None: consecutive.
    """

    q: Any
    pools: tuple[Any, Any]
    scales: tuple[Any, ...]
    sums: Any
    table: Any
    spans: Any
    lengths: Any
    positions: Any
    tokens: Any


def _iota(shape, axis):
    """i32[shape] that counts along ``axis``, in registers of layout WGMMA."""
    if compat.interpreting():
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return compat.plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=compat.plgpu.Layout.WGMMA)


def _capped(score, scale, soft_cap):
    """Scaled and soft-capped scores in units of log 2; tanh by its exponential, whose hardware form is exact enough."""
    if soft_cap is None:
        return score * (scale * LOG2E)
    grown = jnp.exp2(score * (2 * LOG2E * scale / soft_cap))
    return (soft_cap * LOG2E) - (2 * soft_cap * LOG2E) / (grown + 1.0)


def _share(spans, b, k, split, splits):
    """First tile and number of tiles of one share: the tiles in use, divided evenly."""
    total = spans[b, k]
    size = lax.div(total + (splits - 1), jnp.int32(splits))
    first = jnp.minimum(split * size, total)
    return first, jnp.minimum(size, total - first)


def _matrices(shape, dtype):
    """Shared memory for matrices [..., rows, columns], laid out as WGMMA and the copy engine want them."""
    plgpu, bits = compat.plgpu, jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def launch(given: Operands, *, scale, soft_cap, window, config: Tiles, splits: int):
    """Partial outputs f32[parts, B, K, splits, m, d / parts] and log-sum-exps f32[B, K, splits, m]."""
    pl, plgpu = compat.pl, compat.plgpu
    parts, B, K, m, width = given.q.shape
    page = given.pools[0].shape[2]
    pages, stages = KEYS // page, config.stages
    tile_layout = plgpu.Layout.WGMMA
    by_row, by_column = tile_layout.reduce(1), tile_layout.reduce(0)
    coded, selected = bool(given.scales), given.tokens is not None
    inputs = {
        "q": given.q,
        "k": given.pools[0],
        "v": given.pools[1],
        "scales": given.scales,
        "sums": given.sums,
        "table": given.table,
        "spans": given.spans,
        "lengths": given.lengths,
        "positions": given.positions,
        "tokens": given.tokens,
    }
    leaves, structure = jax.tree.flatten(inputs)
    ring = (stages, KEYS, given.pools[0].shape[3])
    scratch = {
        "q": _matrices((parts, ROWS, width), jnp.bfloat16),
        "k": _matrices(ring, given.pools[0].dtype),
        "v": _matrices(ring, given.pools[1].dtype),
        "positions": plgpu.SMEM((ROWS,), jnp.int32),
        "out": _matrices((parts, ROWS, width), jnp.float32),
        "lse": plgpu.SMEM((ROWS,), jnp.float32),
        "ready": plgpu.Barrier(
            num_arrivals=2 * pages + len(given.scales) * pages + selected, num_barriers=stages
        ),
        "free": plgpu.Barrier(num_barriers=stages),
        "started": plgpu.Barrier(num_arrivals=parts + 1 + coded),
    }
    if selected:
        scratch["tokens"] = plgpu.SMEM((stages, KEYS), jnp.int32)
    if coded:
        scratch["scales"] = [plgpu.SMEM((stages, KEYS), each.dtype) for each in given.scales]
        scratch["sums"] = plgpu.SMEM((ROWS,), jnp.float32)
        scratch["operands"] = [_matrices((parts, KEYS, width), jnp.bfloat16) for _ in range(2)]
    places, layout = jax.tree.flatten(scratch, is_leaf=lambda x: not isinstance(x, dict | list))

    def body(*refs):
        source = jax.tree.unflatten(structure, refs[: len(leaves)])
        out, lse = refs[len(leaves) : len(leaves) + 2]
        tile = jax.tree.unflatten(layout, refs[len(leaves) + 2 :])
        split, k, b = (lax.axis_index(name) for name in ("split", "head", "row"))
        blocks = jnp.int32(m // ROWS)
        b, block = lax.div(b, blocks), lax.rem(b, blocks)
        here = pl.ds(block * ROWS, ROWS)
        first, count = _share(source["spans"], b, k, split, splits)
        length = source["lengths"][b, k]
        thread = lax.axis_index("thread")

        def at(step):
            return lax.rem(step, jnp.int32(stages))

        @pl.when(thread == 1)
        def produce():
            @pl.loop(0, count)
            def _(step):
                stage = at(step)
                ready = tile["ready"].at[stage]
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(tile["free"].at[stage]))
                if selected:
                    keys = pl.ds((first + step) * KEYS, KEYS)
                    plgpu.copy_gmem_to_smem(source["tokens"].at[b, k, keys], tile["tokens"].at[stage], ready)
                for i in range(pages):
                    physical = source["table"][b, k, (first + step) * pages + i]
                    part = pl.ds(i * page, page)
                    for name in ("k", "v"):
                        plgpu.copy_gmem_to_smem(
                            source[name].at[physical, k], tile[name].at[stage, part], ready
                        )
                    for given_scale, kept in zip(source["scales"], tile.get("scales", ())):
                        plgpu.copy_gmem_to_smem(given_scale.at[physical, k], kept.at[stage, part], ready)

            # Nobody leaves while its barriers are still signalled.
            @pl.loop(jnp.maximum(count - stages, 0), count)
            def _(step):
                plgpu.barrier_wait(tile["free"].at[at(step)])

        def operands(name, index, stage):
            """The tile of keys (0) or values (1) as bfloat16 operands."""
            if not coded:
                return [tile[name].at[stage]]
            codes = mosaic.load(tile[name].at[stage], tile_layout)
            halves = [codes] if parts == 1 else [codes & jnp.uint8(_LOW), codes & jnp.uint8(_HIGH)]
            for part, half in enumerate(halves):
                tile["operands"][index][part] = half.astype(jnp.bfloat16)
            plgpu.commit_smem()
            return [tile["operands"][index].at[part] for part in range(parts)]

        def scale_of(index, stage):
            values = mosaic.load(tile["scales"][index].at[stage], by_column).astype(jnp.float32)
            return lax.broadcast_in_dim(values, (ROWS, KEYS), [1])

        def visible(begin, stage, position):
            """bool[ROWS, KEYS]"""
            if selected:
                token = mosaic.load(tile["tokens"].at[stage], by_column)
                token = lax.broadcast_in_dim(token, (ROWS, KEYS), [1])
                seen = (token >= 0) & (token < length)
            else:
                token = begin + _iota((ROWS, KEYS), 1)
                seen = token < length
            distance = lax.broadcast_in_dim(position, (ROWS, KEYS), [0]) - token
            seen = seen & (distance >= 0)
            return seen if window is None else seen & (distance < window)

        def silence(begin, stage):
            """Zero for plain values of keys that are not there, which may be NaN: a weight of 0 does not silence those."""
            shape = (KEYS, width)

            def clear():
                if selected:
                    token = mosaic.load(tile["tokens"].at[stage], by_row)
                    token = lax.broadcast_in_dim(token, shape, [0])
                    there = (token >= 0) & (token < length)
                else:
                    there = begin + _iota(shape, 0) < length
                values = tile["v"].at[stage]
                kept = mosaic.load(values, tile_layout)
                values[...] = jnp.where(there, kept, jnp.zeros_like(kept))
                plgpu.commit_smem()

            if selected:
                clear()
            else:
                pl.when(begin + KEYS > length)(clear)

        @pl.when(thread == 0)
        def consume():
            for part in range(parts):
                plgpu.copy_gmem_to_smem(source["q"].at[part, b, k, here], tile["q"].at[part], tile["started"])
            plgpu.copy_gmem_to_smem(source["positions"].at[b, here], tile["positions"], tile["started"])
            if coded:
                plgpu.copy_gmem_to_smem(source["sums"].at[b, k, here], tile["sums"], tile["started"])
            plgpu.barrier_wait(tile["started"])
            position = mosaic.load(tile["positions"], by_row)

            def step(index, carry):
                totals, shift, peak, weight = carry
                stage = at(index)
                begin = (first + index) * KEYS
                plgpu.barrier_wait(tile["ready"].at[stage])
                first_keys, *other_keys = operands("k", 0, stage)
                score = mosaic.mma(None, tile["q"].at[0], first_keys, transpose_b=True)
                for part, keys in enumerate(other_keys, start=1):
                    score = mosaic.mma(score, tile["q"].at[part], keys, transpose_b=True)
                if coded:
                    sums = lax.broadcast_in_dim(mosaic.load(tile["sums"], by_row), (ROWS, KEYS), [0])
                    score = score * scale_of(0, stage) + sums * scale_of(1, stage)
                seen = visible(begin, stage, position)
                score = jnp.where(seen, _capped(score, scale, soft_cap), -jnp.inf)
                above = jnp.maximum(peak, score.max(axis=1))
                weights = jnp.exp2(score - lax.broadcast_in_dim(above, score.shape, [0]))
                fade = jnp.exp2(peak - above)
                weight = weight * fade + weights.sum(axis=1)
                if coded:
                    offsets = jnp.where(seen, weights * scale_of(3, stage), 0.0)
                    shift = shift * fade + offsets.sum(axis=1)
                    weights = jnp.where(seen, weights * scale_of(2, stage), 0.0)
                else:
                    silence(begin, stage)
                weights = weights.astype(jnp.bfloat16)
                fade = lax.broadcast_in_dim(fade, totals[0].shape, [0])
                values = operands("v", 1, stage)
                totals = [mosaic.mma(total * fade, weights, v) for total, v in zip(totals, values)]
                plgpu.barrier_arrive(tile["free"].at[stage])
                return totals, shift, above, weight

            def row(value):
                return mosaic.cast_layout(jnp.full((ROWS,), value, jnp.float32), by_row)

            zero = jnp.zeros((ROWS, width), jnp.float32)
            totals = [mosaic.cast_layout(zero, tile_layout) for _ in range(parts)]
            totals, shift, peak, weight = lax.fori_loop(
                0, count, step, (totals, row(0.0), row(_NOTHING), row(0.0))
            )
            some = weight > 0
            safe = jnp.where(some, weight, 1.0)
            for part, total in enumerate(totals):
                total = total * (1 / 16) if part == 1 else total
                if coded:
                    total = total + lax.broadcast_in_dim(shift, total.shape, [0])
                tile["out"][part] = total / lax.broadcast_in_dim(safe, total.shape, [0])
            tile["lse"][...] = jnp.where(some, peak * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
            plgpu.commit_smem()
            for part in range(parts):
                plgpu.copy_smem_to_gmem(tile["out"].at[part], out.at[part, b, k, split, here])
            plgpu.copy_smem_to_gmem(tile["lse"], lse.at[b, k, split, here])
            plgpu.wait_smem_to_gmem(0)

    run = compat.mosaic_kernel(
        body,
        name="paged_attention",
        out_type=[
            jax.ShapeDtypeStruct((parts, B, K, splits, m, width), jnp.float32),
            jax.ShapeDtypeStruct((B, K, splits, m), jnp.float32),
        ],
        scratch_types=places,
        grid=(splits, K, B * (m // ROWS)),
        grid_names=("split", "head", "row"),
        num_threads=2,
        thread_name="thread",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    return run(*leaves)
