"""What the two backward kernels share: rows that stay, a ring through which the other side's rows come by, and results.

The score of a query and a key is the product of their first operands (q, k), the gradient of its weight that of their
second ones (dout, v), whichever side stays. Scores are taken again from q and k, weights from the final log-sum-exp
(FlashAttention-2, arXiv 2307.08691). One warpgroup sums each result in a fixed order, without atomics: two runs agree bit
for bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import compat
from pallas_kernels.attention.blocks import Visits
from pallas_kernels.attention.common import CONSUMERS, ROWS, compiler_params, full, key_rows, matrices


class Side(NamedTuple):
    """The arrays of the queries or of the keys.

    Attributes:
        first: q or k.
        second: dout or v, of the same shape.
        layout: of both, "BTKD" or "BKTD".
        rows: what is known of each row: [B, m, L], or [B, H, m, L] where heads differ.
    """

    first: Array
    second: Array
    layout: str
    rows: tuple[Array, ...]


class Refs(NamedTuple):
    """A side in shared memory: matrices [n, parts, rows, columns] and what is known of their rows, [n, m, rows]."""

    first: Any
    second: Any
    rows: tuple[Any, ...]

    def at(self, n: Any) -> "Refs":
        return Refs(self.first.at[n], self.second.at[n], tuple(row.at[n] for row in self.rows))


class Second(NamedTuple):
    """When the second operand of a visiting block may be read, and that it was."""

    wait: Callable[[], None]
    free: Callable[[], None]


# step(visiting block, half of the columns, its second operand, sums, is any pair hidden?) -> sums
Step = Callable[[Refs, Any, Second, Any, bool], Any]


def parts_of(d: int) -> int:
    """Parts of the columns, one warpgroup each; 1: every warpgroup has all columns."""
    return 1 if d <= 128 else CONSUMERS


def own_rows(d: int) -> int:
    """Rows that stay in one block.

    Up to d = 128 each warpgroup has 64 rows of its own. Beyond, the results of 64 rows and two tiles of scores exceed its
    registers: both have the same rows and half of the columns each.
    """
    return CONSUMERS // parts_of(d) * ROWS


def launch(
    prepare: Callable[[Refs], Step],
    *,
    name: str,
    own: Side,
    visiting: Side,
    visits: Visits,
    block: int,
    stages: int,
    members: int | None,
    head_of: Callable[[Any, Any], Any],
    scales: tuple[float, ...],
    last_first: bool,
) -> list[Array]:
    """Run a backward kernel over every block and head of the side that stays.

    Args:
        prepare: from the rows that a warpgroup keeps to what it does with each visiting block.
        name: of the kernel.
        own: the side that stays, whole to blocks of :func:`own_rows`.
        visiting: the side that comes by, whole to ``block``.
        visits: the blocks to visit, for each block that stays.
        block: visiting rows of a step.
        stages: visiting blocks in flight.
        members: heads of the visiting side that come by for each head of the other; all go over the wholly visible
            blocks first. None: the one that serves it.
        head_of: from (own head, member) to the visiting head.
        scales: of the results, which are the gradients of ``own.first`` and, with two, of ``own.second``.
        last_first: blocks run from the last one down.

    Returns:
        the results, in the shapes and dtypes of the operands.
    """
    pl, plgpu = compat.pl, compat.plgpu
    dtype, d = own.first.dtype, own.first.shape[3]
    parts = parts_of(d)
    sets, columns = CONSUMERS // parts, d // parts
    heads = own.first.shape[2 if own.layout == "BTKD" else 1]
    B, blocks, _ = visits.counts.shape
    mine, theirs = len(own.rows), len(visiting.rows)
    count = mine + theirs + 6

    def part(n):
        return pl.ds(n * columns, columns)

    def copies(source, target, layout, b, head, rows):
        """Pairs (from, to) of one block: row data and first operand, then second operand."""

        def matrix(ref, shared):
            return [(key_rows(ref, b, rows, head, layout, part(n)), shared.at[n]) for n in range(parts)]

        known = [
            (ref.at[b, :, rows] if len(ref.shape) == 3 else ref.at[b, head, :, rows], shared)
            for ref, shared in zip(source.rows, target.rows, strict=True)
        ]
        return known + matrix(source.first, target.first), matrix(source.second, target.second)

    def kernel(*refs):
        inputs, (*out_refs, matrices_s, rows_s, barriers) = refs[:count], refs[count:]
        own_refs = Refs(inputs[0], inputs[1], inputs[2 : 2 + mine])
        other_refs = Refs(inputs[2 + mine], inputs[3 + mine], inputs[4 + mine : -2])
        order_ref, counts_ref = inputs[-2:]
        own_s, ring = (Refs(first, second, rows) for (first, second), rows in zip(matrices_s, rows_s))
        own_in, first_in, second_in, first_free, second_free, done = barriers
        b, head = lax.axis_index("row"), lax.axis_index("head")
        i = lax.axis_index("block")
        i = blocks - 1 - i if last_first else i
        me = lax.axis_index("warpgroup")
        free, total = counts_ref[b, i, 0], counts_ref[b, i, 1]
        clear, steps = (free, total) if members is None else (members * free, members * total)

        def rows_of_set(n):
            return pl.ds((i * sets + n) * ROWS, ROWS)

        @pl.when(me < CONSUMERS)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            own_set, half = (me, 0) if parts == 1 else (0, me)
            plgpu.barrier_wait(own_in)
            step = prepare(own_s.at(own_set))

            def visit(n, sums, masked):
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(first_in.at[slot])
                second = Second(
                    lambda: plgpu.barrier_wait(second_in.at[slot]),
                    lambda: plgpu.barrier_arrive(second_free.at[slot]),
                )
                sums = step(ring.at(slot), half, second, sums, masked)
                plgpu.barrier_arrive(first_free.at[slot])
                return sums

            sums = tuple(full((ROWS, columns), 0.0, plgpu.Layout.WGMMA) for _ in scales)
            sums = lax.fori_loop(0, clear, lambda n, c: visit(n, c, False), sums)
            sums = lax.fori_loop(clear, steps, lambda n, c: visit(n, c, True), sums)
            # What stayed gives its place to its gradient once neither warpgroup reads it.
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            results = list(zip(sums, scales, (own_s.first, own_s.second), out_refs))
            for value, scale, shared, _ in results:
                shared[own_set, half] = (value if scale == 1.0 else value * scale).astype(dtype)
            plgpu.commit_smem()
            for *_, shared, out_ref in results:
                target = key_rows(out_ref, b, rows_of_set(own_set), head, own.layout, part(half))
                plgpu.copy_smem_to_gmem(shared.at[own_set, half], target)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == CONSUMERS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")
            for n in range(sets):
                for pairs in copies(own_refs, own_s.at(n), own.layout, b, head, rows_of_set(n)):
                    for source, target in pairs:
                        plgpu.copy_gmem_to_smem(source, target, own_in)

            def fetch(n, place, member):
                slot = lax.rem(n, jnp.int32(stages))
                rows = pl.ds(order_ref[b, i, place] * block, block)
                groups = copies(other_refs, ring.at(slot), visiting.layout, b, head_of(head, member), rows)
                gates = ((first_free, first_in), (second_free, second_in))
                again = n >= stages
                for (freed, filled), pairs in zip(gates, groups):
                    pl.when(again)(lambda freed=freed: plgpu.barrier_wait(freed.at[slot]))
                    for source, target in pairs:
                        plgpu.copy_gmem_to_smem(source, target, filled.at[slot])

            if members is None:
                pl.loop(0, total)(lambda n: fetch(n, n, 0))
            else:

                @pl.loop(0, clear)
                def _clear(n):
                    fetch(n, lax.rem(n, free), lax.div(n, free))

                @pl.loop(clear, steps)
                def _masked(n):
                    fetch(n, free + lax.rem(n - clear, total - free), lax.div(n - clear, total - free))

            # Nobody leaves while its barriers are still signalled.
            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _drain(n):
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(first_free.at[slot])
                plgpu.barrier_wait(second_free.at[slot])

    def pair(n, rows):
        return (matrices((n, parts, rows, columns), dtype),) * 2

    def known(side, n, rows):
        return tuple(plgpu.SMEM((n, w.shape[-2], rows), w.dtype) for w in side.rows)

    ring_barrier = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
    return compat.mosaic_kernel(
        kernel,
        name=name,
        out_type=[jax.ShapeDtypeStruct(own.first.shape, dtype) for _ in scales],
        grid=(heads, blocks, B),
        grid_names=("head", "block", "row"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=(
            (pair(sets, ROWS), pair(stages, block)),
            (known(own, sets, ROWS), known(visiting, stages, block)),
            (
                plgpu.Barrier(num_arrivals=sets * (2 * parts + mine)),
                plgpu.Barrier(num_arrivals=parts + theirs, num_barriers=stages),
                plgpu.Barrier(num_arrivals=parts, num_barriers=stages),
                ring_barrier,
                ring_barrier,
                plgpu.Barrier(num_arrivals=CONSUMERS),
            ),
        ),
        compiler_params=compiler_params(),
    )(own.first, own.second, *own.rows, visiting.first, visiting.second, *visiting.rows, *visits)
