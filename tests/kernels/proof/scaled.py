"""Two tiny ops with kernels, on which the proof system itself is tried: a scaled product and a scaled row gather."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import compat, mosaic
from pallas_kernels import tiles as tuned
from pallas_kernels.cases import Case
from pallas_kernels.compat import pl, plgpu, pltriton

FACTOR = 0.5
BARRIER = True


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile, and how much of them is written: less than all is wrong, and the tuner shall see that."""

    rows: int = 64
    share: float = 1.0

    def candidates(self) -> "Iterator[Tiles]":
        yield Tiles(rows=128)
        yield Tiles(share=0.5)


def _product_body(tiles, x, w, out, x_tile, w_tile, out_tile, ready):
    row = pl.ds(jax.lax.axis_index("row") * tiles.rows, tiles.rows)
    plgpu.copy_gmem_to_smem(x.at[row], x_tile, ready.at[0])
    plgpu.copy_gmem_to_smem(w, w_tile, ready.at[1])
    if BARRIER:
        plgpu.barrier_wait(ready.at[0])
        plgpu.barrier_wait(ready.at[1])
    total = mosaic.mma(None, x_tile, w_tile)
    out_tile[...] = (tiles.share * FACTOR * total).astype(out_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, out.at[row])
    plgpu.wait_smem_to_gmem(0)


def _tile(shape, dtype):
    swizzle = plgpu.find_swizzle(shape[1] * jnp.dtype(dtype).itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _product_kernel(x, w):
    (M, K), N = x.shape, w.shape[1]
    tiles = tuned.tiles("scaled", "product", Tiles())
    scratch = [_tile((tiles.rows, K), x.dtype), _tile((K, N), w.dtype), _tile((tiles.rows, N), x.dtype)]
    run = compat.mosaic_kernel(
        partial(_product_body, tiles),
        name="scaled_product",
        out_type=jax.ShapeDtypeStruct((M, N), x.dtype),
        scratch_types=[*scratch, plgpu.Barrier(num_barriers=2)],
        grid=(M // tiles.rows,),
        grid_names=("row",),
    )
    return run(x, w)


@jax.custom_vjp
def _product(x, w):
    return _product_kernel(x, w)


_product.defvjp(
    lambda x, w: (_product(x, w), (x, w)),
    lambda kept, g: (_product_kernel(g, kept[1].T), (FACTOR * kept[0].T @ g).astype(g.dtype)),
)


def product(*, x, w, implementation):
    """``x @ w / 2``; "xla" multiplies in XLA, "reference" too."""
    if implementation == "mosaic_gpu":
        return _product(x, w)
    return (0.5 * jnp.matmul(x, w, precision="highest")).astype(x.dtype)


def _gather_body(x, rows, out):
    index = pltriton.load(rows.at[:])
    out[...] = FACTOR * x[index, :]


def gather(*, x, rows, implementation):
    """``x[rows] / 2``."""
    if implementation != "triton":
        return 0.5 * x[rows]
    n, d = rows.shape[0], x.shape[1]
    block = 16
    run = compat.triton_call(
        _gather_body,
        name="scaled_gather",
        grid=(n // block,),
        in_specs=[pl.BlockSpec(x.shape, lambda i: (0, 0)), pl.BlockSpec((block,), lambda i: (i,))],
        out_specs=pl.BlockSpec((block, d), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((n, d), x.dtype),
    )
    return run(x, rows)


def _operands(M, K, N, dtype, key):
    one, other = jax.random.split(key)
    return {"x": jax.random.normal(one, (M, K), dtype), "w": jax.random.normal(other, (K, N), dtype)}


def _rows(S, n, d, key):
    return {"x": jax.random.normal(key, (S, d)), "rows": jax.random.randint(key, (n,), 0, S - 4)}


def _unread(arrays):
    return {"x": jnp.arange(arrays["x"].shape[0])[:, None] >= arrays["x"].shape[0] - 4}


CASES = [
    Case(
        name="product 128",
        op="scaled",
        function=product,
        inputs=partial(_operands, 128, 64, 64, jnp.bfloat16),
        gradients=("x", "w"),
        small=True,
        registers=96,
    ),
    Case(
        name="gather 32",
        op="scaled",
        function=gather,
        inputs=partial(_rows, 64, 32, 64),
        implementations=("triton",),
        small=True,
        padding=_unread,
        tolerance=1e-6,
    ),
]
