"""Token by token what a plan says block by block: for programs that gather a packed batch into workers' slots."""

from typing import Any, NamedTuple

import numpy as np

from parallel.context.plan import Plan


class Layout(NamedTuple):
    """Arrays over workers' slots, NumPy's on the host and JAX's in a program.

    Attributes:
        index: i32[N, S, block], the place of each token in the concatenation of all documents; -1 = padding.
        segment_ids: i32[N, S, block], documents counted from 1; 0 = padding.
        positions: i32[N, S, block], in the document; 0 at padding.
    """

    index: Any
    segment_ids: Any
    positions: Any


def layout(plan: Plan) -> Layout:
    """Where every token is; each is in one place."""
    arrays, capacity = plan.arrays, plan.capacity
    shape = (capacity.workers, capacity.slots, capacity.block)
    index, segment_ids, positions = (
        np.full(shape, -1, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
    )
    flat = index.reshape(-1), segment_ids.reshape(-1), positions.reshape(-1)
    worker, column = np.nonzero(arrays.length)
    first = (worker * capacity.slots + arrays.slot[worker, column]) * capacity.block
    first += arrays.offset[worker, column]
    ramp = np.arange(capacity.block, dtype=np.int32)
    columns = (
        first,
        *(each[worker, column] for each in (arrays.length, arrays.start, arrays.document, arrays.position)),
    )
    # Slices, not one index per token: a scatter of millions of tokens takes ten times as long.
    for at, length, start, document, position in zip(*(each.tolist() for each in columns)):
        span = slice(at, at + length)
        np.add(ramp[:length], start, out=flat[0][span])
        flat[1][span] = document + 1
        np.add(ramp[:length], position, out=flat[2][span])
    return Layout(index, segment_ids, positions)
