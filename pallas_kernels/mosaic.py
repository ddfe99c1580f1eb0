"""What Mosaic kernels are written with: matrix products and layouts that the interpreter does not know are replaced there.

A record of an interpreted kernel therefore says "MMA path not executed": the tensor core instructions themselves run on
a GPU only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat


def mma(
    acc: jax.Array | None, a: Any, b: Any, *, transpose_a: bool = False, transpose_b: bool = False
) -> jax.Array:
    """``acc + a @ b`` on the tensor cores of one warpgroup, waited for: in float32, of int8 in int32.

    Operands of 8 bits lie K-major, [M, K] and [N, K] with ``transpose_b``: the tensor cores transpose 16 bits only. Of
    float8 Hopper keeps about 14 bits of a sum.

    Args:
        acc: [M, N] in registers, M a multiple of 64, N of 8 and at most 256; None: zeros.
        a: [M, K], a ref in shared memory or a value in registers of layout WGMMA; with ``transpose_a`` a ref [K, M].
        b: a ref in shared memory, [K, N], or [N, K] with ``transpose_b``.
        transpose_a: contract the major dimension of a.
        transpose_b: contract the minor dimension of b.
    """
    rows, columns = a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]
    exact = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    if compat.interpreting():
        left, right = a[...], b[...]
        # The reads above are the proxy's in hardware; without a fence a later TMA into b would count as a race.
        compat.plgpu.commit_smem()
        dims = (((0 if transpose_a else 1,), (1 if transpose_b else 0,)), ((), ()))
        out = jax.lax.dot_general(left, right, dims, preferred_element_type=exact)
        return out if acc is None else acc + out
    left = a.transpose((1, 0)) if transpose_a else a
    right = b.transpose((1, 0)) if transpose_b else b

    def product(total: Any) -> Any:
        compat.plgpu.wgmma(total, left, right)
        return total[...] if acc is None else None

    if acc is None:
        return compat.pl.run_scoped(product, compat.plgpu.ACC((rows, columns), exact))
    return compat.pl.run_state(product)(compat.plgpu.ACC.init(acc))


def feed(count: Any, stages: int, free: Any, fetch: Callable[[Any, Any], None]) -> None:
    """The life of a warpgroup that fetches for others, through a ring of ``stages`` places.

    Args:
        count: steps.
        free: barriers, one a place, at which all who read a place arrive when they have.
        fetch: takes the step and its place, and starts the copies into it.
    """
    pl, plgpu = compat.pl, compat.plgpu
    plgpu.set_max_registers(40, action="decrease")

    @pl.loop(0, count)
    def _(step):
        stage = jax.lax.rem(step, jnp.int32(stages))
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[stage]))
        fetch(step, stage)

    # Nobody leaves while its barriers are still signalled.
    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _(step):
        plgpu.barrier_wait(free.at[jax.lax.rem(step, jnp.int32(stages))])


def write_rows(held: Any, place: Callable[[Any], Any], base: Any, first: Any, end: Any) -> None:
    """Starts copies of those rows of a tile that lie in [first, end), in pieces of powers of two.

    Args:
        held: the tile in shared memory, committed; not tiled, for pieces of it begin at any row, and of rows of a multiple
            of 128 bytes, where the copy engine may begin. A power of two of rows.
        place: from a slice of rows to the ref that receives them.
        base: row of the first of the tile.
        first: first row that is copied.
        end: after the last one.
    """
    pl, size = compat.pl, held.shape[0]
    begin = jnp.clip(first - base, 0, size)
    rows = jnp.clip(end - base, 0, size) - begin
    while size:

        @pl.when((rows & size) != 0)
        def _piece(begin=begin, size=size):
            compat.plgpu.copy_smem_to_gmem(held.at[pl.ds(begin, size)], place(pl.ds(base + begin, size)))

        begin, size = begin + (rows & size), size // 2


def cast_layout(x: jax.Array, layout: Any) -> jax.Array:
    """``plgpu.layout_cast``, nothing at all where interpreted."""
    return x if compat.interpreting() else compat.plgpu.layout_cast(x, layout)


def load(ref: Any, layout: Any = None, *, optimized: bool = True) -> jax.Array:
    """The value of a ref in registers of this layout; a plain read where interpreted.

    ``optimized`` False: also where banks of shared memory conflict, or the ref lies in global memory.
    """
    return ref[...] if compat.interpreting() else compat.load(ref, layout=layout, optimized=optimized)


def upper_nibbles(x: jax.Array, layout: Any) -> tuple[Any, Any]:
    """Of bytes that are two codes plus 8, sixteen times the codes, of the low nibbles and of the high ones.

    Four instructions for four bytes: the bias goes by exclusive or, once for both, and what crosses bytes is masked.

    Args:
        x: int8, in registers of this layout, four neighbours a thread.
    """
    if compat.interpreting():
        signed = x ^ jnp.int8(-0x78)
        return signed << jnp.int8(4), signed & jnp.int8(-0x10)
    bias, mask = -0x77777778, -0x0F0F0F10

    def low(word: Any, constant: Callable[[int], Any], arith: Any) -> Any:
        unbiased = arith.xori(word, constant(bias))
        return arith.andi(arith.shli(unbiased, constant(4)), constant(mask))

    def high(word: Any, constant: Callable[[int], Any], arith: Any) -> Any:
        return arith.andi(arith.xori(word, constant(bias)), constant(mask))

    return compat.on_words(x, layout, low), compat.on_words(x, layout, high)


def store(ref: Any, value: jax.Array, *, optimized: bool = True) -> None:
    """Writes registers to a whole ref; a plain write where interpreted. ``optimized`` as in :func:`load`."""
    if compat.interpreting():
        ref[...] = value
    else:
        compat.store(ref, value, optimized=optimized)


def iota(shape: tuple[int, ...], axis: int, layout: Any) -> jax.Array:
    """int32 that counts along ``axis``, in registers of this layout."""
    if compat.interpreting():
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return compat.plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
