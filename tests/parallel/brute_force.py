"""What plans should say, counted token by token."""

import numpy as np

from parallel.context import DIAGONAL, SEGMENT, Plan, layout


def visible(lengths: list[int], window: int | None = None) -> np.ndarray:
    """i64[T, T]: 1 where a query may see a key, in the concatenation of the documents."""
    segment = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(segment))
    apart = place[:, None] - place
    seen = (segment[:, None] == segment) & (apart >= 0)
    return (seen if window is None else seen & (apart < window)).astype(np.int64)


def computed(plan: Plan, tokens: int, window: int | None = None) -> np.ndarray:
    """i64[T, T]: how often each (query, key) pair is computed by workers that know nothing but the plan's arrays."""
    where, arrays, capacity = layout(plan), plan.arrays, plan.capacity
    counts = np.zeros((tokens, tokens), np.int64)
    slots, group = capacity.slots, capacity.stage_rounds
    local = np.stack([where.index, where.segment_ids, where.positions], axis=-1)
    keys = np.full((capacity.workers, slots + group, capacity.block, 3), -1)
    keys[:, :slots] = local
    for stage in range(capacity.stages + 1):
        for number in range((stage - 1) * group, stage * group) if stage else ():
            for receiver in range(capacity.workers):
                sender = arrays.receive_from[receiver, number]
                if sender >= 0:
                    assert arrays.send_to[sender, number] == receiver
                    assert arrays.receive_slot[receiver, number] == arrays.send_slot[sender, number]
                    keys[receiver, slots + number % group] = local[sender, arrays.send_slot[sender, number]]
        for worker in range(capacity.workers):
            first, last = arrays.work_start[worker, stage : stage + 2]
            for row, column, kind in arrays.work[worker, first:last]:
                query, key = local[worker, row], keys[worker, column]
                seen = np.ones((capacity.block, capacity.block), bool)
                if kind in (SEGMENT, DIAGONAL):
                    seen &= (query[:, None, 1] == key[:, 1]) & (query[:, None, 1] > 0)
                if kind == DIAGONAL:
                    seen &= query[:, None, 2] >= key[:, 2]
                if window is not None:
                    seen &= query[:, None, 2] - key[:, 2] < window
                assert kind == DIAGONAL or seen.any(), "a pair of blocks of which nothing is seen"
                at = np.nonzero(seen)
                assert (query[at[0], 0] >= 0).all() and (key[at[1], 0] >= 0).all()
                np.add.at(counts, (query[at[0], 0], key[at[1], 0]), 1)
    return counts
