"""The Hopper kernel of paged attention: one query tile of 64 rows per CTA, over one share of a row's pages.

A producer warpgroup fills the ring; a consumer warpgroup multiplies and keeps the softmax in registers. Codes are turned
into bfloat16 on the way from the ring to the operands of WGMMA. Scales and offsets of tokens move to the scores and the
probabilities, where the codes are exact operands; keys with scales of channels are dequantised on that way, and rounded.
Four-bit codes make two operands, the two halves of the channels; the high one is not shifted down, its factor of 16 is
taken out where it is cheap. Two operands are also what more than 128 channels are, whose registers and place in shared
memory are then those of one half, but for the sums.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, mosaic
from pallas_kernels.attention.common import LOG2E, ROWS, capped, compiler_params, full, matrices
from pallas_kernels.paged_attention.mosaic_ring import HIGH, KEYS, SHARED_BYTES, Places, Pool, Ring, Tiles

# Finite, so that the difference of two peaks is a number before anything was seen.
_NOTHING = -1e30


def share(spans, b, k, split, splits):
    """First tile and number of tiles of one share: the tiles in use, divided evenly."""
    total = spans[b, k]
    size = lax.div(total + (splits - 1), jnp.int32(splits))
    first = jnp.minimum(split * size, total)
    return first, jnp.minimum(size, total - first)


def stages_of(config: Tiles, pools: tuple[Pool, ...], fixed: int) -> int:
    """Tiles in flight beside ``fixed`` bytes of other shared memory."""
    tile = sum(KEYS * math.prod(pool.pages.shape[3:]) * pool.pages.dtype.itemsize for pool in pools)
    return config.stages or max(1, min(4, (SHARED_BYTES - fixed) // tile))


def launch(
    q: Any,
    keys: Pool,
    values: Pool,
    sums: Any,
    positions: Any,
    places: Places,
    *,
    rows: int,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    config: Tiles,
    splits: int,
):
    """Partial outputs f32[parts, B, K, splits, rows, d / parts] and log-sum-exps f32[B, K, splits, m].

    Args:
        q: bf16[parts, B, K, m, d / parts], m a multiple of 64.
        keys: pool of keys.
        values: pool of values, of as many parts.
        sums: f32[B, K, m], sum of each query's channels; None unless keys have scales of tokens.
        positions: i32[B, m], position of each query row; -1 for padding.
        places: which keys, and who sees them.
        rows: rows of the output that are written, at most m.
    """
    pl, plgpu = compat.pl, compat.plgpu
    parts, B, K, m, width = q.shape
    coded, of_token = keys.bits < 16, keys.kind == "token"
    fixed = ROWS * width * (2 * parts + 4) + (2 * 2 * parts * KEYS * width if coded else 0)
    ring = Ring({"k": keys, "v": values}, places, stages_of(config, (keys, values), fixed))
    layout = plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    inputs = {"ring": ring.inputs, "q": q, "sums": sums, "positions": positions}
    leaves, structure = jax.tree.flatten(inputs)
    scratch = {
        "ring": ring.scratch,
        "q": matrices((parts, ROWS, width), jnp.bfloat16),
        "positions": plgpu.SMEM((ROWS,), jnp.int32),
        "out": matrices((ROWS, width), jnp.float32),
        "lse": plgpu.SMEM((ROWS,), jnp.float32),
        "started": plgpu.Barrier(num_arrivals=parts + 1 + of_token),
    }
    if of_token:
        scratch["sums"] = plgpu.SMEM((ROWS,), jnp.float32)
    if coded:
        scratch["operands"] = {name: matrices((parts, KEYS, width), jnp.bfloat16) for name in ("k", "v")}
    held, shapes = jax.tree.flatten(scratch, is_leaf=lambda x: not isinstance(x, dict | list))

    def body(*refs):
        source = jax.tree.unflatten(structure, refs[: len(leaves)])
        out, lse = refs[len(leaves) : len(leaves) + 2]
        tile = jax.tree.unflatten(shapes, refs[len(leaves) + 2 :])
        split, k, b = (lax.axis_index(name) for name in ("split", "head", "row"))
        blocks = jnp.int32(m // ROWS)
        b, block = lax.div(b, blocks), lax.rem(b, blocks)
        here = pl.ds(block * ROWS, ROWS)
        first, count = share(source["ring"]["spans"], b, k, split, splits)
        length = source["ring"]["lengths"][b, k]
        thread = lax.axis_index("thread")

        @pl.when(thread == 1)
        def produce():
            ring.produce(source["ring"], tile["ring"], b, k, first, count)

        def operands(name, stage):
            """The tile of keys or values as operands."""
            found = ring.operands(tile["ring"], name, stage)
            if not coded:
                return found
            kept = tile["operands"][name]
            for part, value in enumerate(found):
                kept[part] = value
            plgpu.commit_smem()
            return [kept.at[part] for part in range(parts)]

        def of_tokens(name, index, stage):
            shape = (ROWS, KEYS)
            return ring.of_tokens(tile["ring"], name, index, stage, by_column, shape, 1)

        def silence(begin, stage):
            """Zero for plain values of keys that are not there, which may be NaN: a weight of 0 does not silence those."""

            def clear():
                _, there = ring.tokens(tile["ring"], stage, begin, length, by_row)
                there = lax.broadcast_in_dim(there, (KEYS, width), [0])
                for place in ring.operands(tile["ring"], "v", stage):
                    kept = mosaic.load(place, layout)
                    place[...] = jnp.where(there, kept, jnp.zeros_like(kept))
                plgpu.commit_smem()

            if ring.selected:
                clear()
            else:
                pl.when(begin + KEYS > length)(clear)

        @pl.when(thread == 0)
        def consume():
            for part in range(parts):
                plgpu.copy_gmem_to_smem(source["q"].at[part, b, k, here], tile["q"].at[part], tile["started"])
            plgpu.copy_gmem_to_smem(source["positions"].at[b, here], tile["positions"], tile["started"])
            if of_token:
                plgpu.copy_gmem_to_smem(source["sums"].at[b, k, here], tile["sums"], tile["started"])
            plgpu.barrier_wait(tile["started"])
            position = mosaic.load(tile["positions"], by_row)

            def step(index, carry):
                totals, shift, peak, weight = carry
                stage = ring.stage(index)
                begin = (first + index) * KEYS
                plgpu.barrier_wait(tile["ring"]["ready"].at[stage])
                score: Any = None
                for part, operand in enumerate(operands("k", stage)):
                    score = mosaic.mma(score, tile["q"].at[part], operand, transpose_b=True)
                if of_token:
                    sums = lax.broadcast_in_dim(mosaic.load(tile["sums"], by_row), (ROWS, KEYS), [0])
                    score = score * of_tokens("k", 0, stage) + sums * of_tokens("k", 1, stage)
                seen = ring.seen(tile["ring"], stage, begin, length, position, window, (ROWS, KEYS), 1)
                score = jnp.where(seen, capped(score, scale, soft_cap), -jnp.inf)
                above = jnp.maximum(peak, score.max(axis=1))
                weights = jnp.exp2(score - lax.broadcast_in_dim(above, score.shape, [0]))
                fade = jnp.exp2(peak - above)
                weight = weight * fade + weights.sum(axis=1)
                if coded:
                    offsets = jnp.where(seen, weights * of_tokens("v", 1, stage), 0.0)
                    shift = shift * fade + offsets.sum(axis=1)
                    weights = jnp.where(seen, weights * of_tokens("v", 0, stage), 0.0)
                else:
                    silence(begin, stage)
                weights = weights.astype(jnp.bfloat16)
                fade = lax.broadcast_in_dim(fade, totals[0].shape, [0])
                totals = [
                    mosaic.mma(total * fade, weights, v) for total, v in zip(totals, operands("v", stage))
                ]
                plgpu.barrier_arrive(tile["ring"]["free"].at[stage])
                return totals, shift, above, weight

            totals = [full((ROWS, width), 0.0, layout) for _ in range(parts)]
            row = [full((ROWS,), value, by_row) for value in (0.0, _NOTHING, 0.0)]
            totals, shift, peak, weight = lax.fori_loop(0, count, step, (totals, *row))
            some = weight > 0
            safe = jnp.where(some, weight, 1.0)
            tile["lse"][...] = jnp.where(some, peak * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
            written = min(rows, ROWS)
            for part, total in enumerate(totals):
                total = total * (1 / HIGH) if part and values.bits == 4 else total
                if coded:
                    total = total + lax.broadcast_in_dim(shift, total.shape, [0])
                plgpu.wait_smem_to_gmem(0)
                tile["out"][...] = total / lax.broadcast_in_dim(safe, total.shape, [0])
                plgpu.commit_smem()
                to = out.at[part, b, k, split, pl.ds(block * ROWS, written)]
                plgpu.copy_smem_to_gmem(tile["out"].at[pl.ds(0, written)], to)
            plgpu.copy_smem_to_gmem(tile["lse"], lse.at[b, k, split, here])
            plgpu.wait_smem_to_gmem(0)

    run = compat.mosaic_kernel(
        body,
        name="paged_attention",
        out_type=[
            jax.ShapeDtypeStruct((parts, B, K, splits, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((B, K, splits, m), jnp.float32),
        ],
        scratch_types=held,
        grid=(splits, K, B * (m // ROWS)),
        grid_names=("split", "head", "row"),
        num_threads=2,
        thread_name="thread",
        compiler_params=compiler_params(),
    )
    return run(*leaves)
