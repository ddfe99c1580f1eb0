"""The Hopper kernel of the mean probabilities: keys are read a second time, their scores against the final log-sum-exp.

The log-sum-exp of all keys is known only after the combine. Instead of reading a key again (2 d bytes in bfloat16,
d + 4 and d / 2 + 4 where quantised) the first kernel could write every score down (float16, 4 bytes a key and query row
for writing and reading, SparseSpec, arXiv 2512.01278). With d = 128 that is less for under 64, 33 or 17 rows. A window of
9 queries has 36 rows at 4 query heads per KV head, 54 at 6, 72 at 8 and 144 at 16, so that dumping would win by a
quarter of the bytes of one in the best of the presets, and lose over quantised pages and in all the others; it also rounds
probabilities to 1 % and takes memory that grows with rows times context. Hence the second reading, in one way for all.

Products are transposed, keys times queries: a sum over queries then stays within a row, and as many columns are
multiplied as there are rows of queries, not 64.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, mosaic
from pallas_kernels.attention.common import LOG2E, capped, compiler_params, matrices
from pallas_kernels.paged_attention.mosaic_kernel import share, stages_of
from pallas_kernels.paged_attention.mosaic_ring import KEYS, Places, Pool, Ring, Tiles

# Query rows of one CTA at most; the columns of a product.
MOST_ROWS = 128
_PENDING = 2


def columns_of(rows: int) -> tuple[int, int]:
    """Number of blocks of query rows, and rows of each: a multiple of 8."""
    blocks = -(-rows // MOST_ROWS)
    return blocks, -(-rows // (blocks * 8)) * 8


def launch(
    q: Any,
    keys: Pool,
    sums: Any,
    lse: Any,
    positions: Any,
    places: Places,
    *,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    config: Tiles,
    splits: int,
):
    """f32[B, K, blocks, n page]: the sum over a block's query rows of each key's probability.

    Tiles beyond ``places.spans`` are not written.

    Args:
        q: bf16[parts, B, K, blocks, rows, d / parts], rows as :func:`columns_of` gives it.
        keys: pool of keys.
        sums: f32[B, K, blocks, rows], sum of each query's channels; None unless keys have scales of tokens.
        lse: f32[B, K, blocks, rows], natural, over all keys; finite.
        positions: i32[B, blocks, rows]; -1 for padding.
        places: which keys, and who sees them.
    """
    pl, plgpu = compat.pl, compat.plgpu
    parts, B, K, blocks, rows, width = q.shape
    of_token = keys.kind == "token"
    ring = Ring({"k": keys}, places, stages_of(config, (keys,), parts * rows * width * 2))
    layout = plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)
    vectors = {"lse": lse, "positions": positions} | ({"sums": sums} if of_token else {})
    leaves, structure = jax.tree.flatten({"ring": ring.inputs, "q": q, "vectors": vectors})
    scratch = {
        "ring": ring.scratch,
        "q": matrices((parts, rows, width), jnp.bfloat16),
        "mass": plgpu.SMEM((_PENDING, KEYS), jnp.float32),
        "started": plgpu.Barrier(num_arrivals=parts),
    }
    held, shapes = jax.tree.flatten(scratch, is_leaf=lambda x: not isinstance(x, dict | list))

    def body(*refs):
        source = jax.tree.unflatten(structure, refs[: len(leaves)])
        mass, tile = refs[len(leaves)], jax.tree.unflatten(shapes, refs[len(leaves) + 1 :])
        split, k, b = (lax.axis_index(name) for name in ("split", "head", "row"))
        b, block = lax.div(b, jnp.int32(blocks)), lax.rem(b, jnp.int32(blocks))
        first, count = share(source["ring"]["spans"], b, k, split, splits)
        length = source["ring"]["lengths"][b, k]
        thread = lax.axis_index("thread")

        @pl.when(thread == 1)
        def produce():
            ring.produce(source["ring"], tile["ring"], b, k, first, count)

        def queries(name):
            """f32 or i32[KEYS, rows], a value for each query row."""
            at = (b, block) if name == "positions" else (b, k, block)
            return mosaic.load(source["vectors"][name].at[at], by_column, optimized=False)

        @pl.when(thread == 0)
        def consume():
            for part in range(parts):
                place = source["q"].at[part, b, k, block]
                plgpu.copy_gmem_to_smem(place, tile["q"].at[part], tile["started"])
            plgpu.barrier_wait(tile["started"])
            position, top = queries("positions"), queries("lse") * LOG2E
            shape = (KEYS, rows)

            @pl.loop(0, count)
            def _(step):
                stage = ring.stage(step)
                begin = (first + step) * KEYS
                plgpu.barrier_wait(tile["ring"]["ready"].at[stage])
                score: Any = None
                for part, operand in enumerate(ring.operands(tile["ring"], "k", stage)):
                    score = mosaic.mma(score, operand, tile["q"].at[part], transpose_b=True)
                if of_token:
                    factor, offset = (
                        ring.of_tokens(tile["ring"], "k", index, stage, by_row, shape, 0) for index in (0, 1)
                    )
                    score = score * factor + offset * lax.broadcast_in_dim(queries("sums"), shape, [1])
                seen = ring.seen(tile["ring"], stage, begin, length, position, window, shape, 0)
                plgpu.barrier_arrive(tile["ring"]["free"].at[stage])
                score = capped(score, scale, soft_cap) - lax.broadcast_in_dim(top, shape, [1])
                weights = jnp.where(seen, jnp.exp2(score), 0.0)
                slot = lax.rem(step, jnp.int32(_PENDING))
                plgpu.wait_smem_to_gmem(_PENDING - 1, wait_read_only=True)
                tile["mass"][slot] = weights.sum(axis=1)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile["mass"].at[slot], mass.at[b, k, block, pl.ds(begin, KEYS)])

            plgpu.wait_smem_to_gmem(0)

    run = compat.mosaic_kernel(
        body,
        name="paged_attention_mass",
        out_type=jax.ShapeDtypeStruct((B, K, blocks, places.table.shape[2] * ring.page), jnp.float32),
        scratch_types=held,
        grid=(splits, K, B * blocks),
        grid_names=("split", "head", "row"),
        num_threads=2,
        thread_name="thread",
        compiler_params=compiler_params(),
    )
    return run(*leaves)
