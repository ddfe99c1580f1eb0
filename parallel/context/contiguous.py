"""Lanes of the layout in which each worker holds one stretch of the packed documents."""

from collections.abc import Sequence

import numpy as np

from parallel.context.blocks import cut
from parallel.context.lanes import Lanes, require_counts


def contiguous_lanes(
    lengths: Sequence[int] | np.ndarray, workers: int, *, reach: int = 3, share: int = 0
) -> Lanes:
    """One lane a worker: token t of the packed documents is token t % share of worker t // share.

    For layers with a state this is the cheapest layout: one state leaves a worker and one enters it, whatever the number of
    blocks. It is what ring attention leaves as it is, and what a reshuffle around attention restores.

    Args:
        lengths: tokens of each document.
        workers: devices that share the batch.
        reach: most inputs that a convolution of the model looks back: its width - 1.
        share: tokens of a worker at least, so that batches share a program.

    Raises:
        ValueError: lengths that are not whole numbers of at least 1, ``workers`` below 1, ``reach`` or ``share`` below 0.
    """
    require_counts(reach=reach, share=share)
    if workers < 1:
        raise ValueError(f"workers={workers}: must be at least 1")
    blocks = cut(lengths, max(1, int(np.sum(lengths))))
    share = max(share, -(-blocks.tokens // workers))
    document = np.full(workers * share, -1)
    document[: blocks.tokens] = np.repeat(blocks.document, blocks.length)
    rows = document.reshape(workers, share)
    segment_ids = np.where(rows >= 0, rows - rows[:, :1] + 1, 0)
    begin = np.arange(workers) * share
    entered = (rows[:, 0] >= 0) & (begin > blocks.start[rows[:, 0]])
    followed = np.flatnonzero(np.append(entered[1:], False))
    order, first = np.full(workers, -1), np.zeros(workers, bool)
    order[: len(followed)] = followed
    first[: len(followed)] = blocks.start[rows[followed, -1]] >= begin[followed]
    number = np.full(workers + 1, -1)
    number[followed + 1] = np.arange(len(followed))
    before = begin[:, None] + np.arange(-reach, 0)
    inside = entered[:, None] & (before >= blocks.start[rows[:, :1]])
    last = np.minimum(begin + share, blocks.tokens) - 1
    ends = np.where(last >= begin, document[np.maximum(last, 0)], -1)
    ends = np.where(last + 1 == (blocks.start + blocks.length)[ends], ends, -1)
    none = np.full((workers, 0, share), -1)
    fields = (
        segment_ids[:, None],
        none,
        none,
        order,
        first,
        number[:-1, None],
        np.where(inside, before, -1)[:, None],
        ends[:, None],
    )
    return Lanes(*(field if field.dtype == bool else field.astype(np.int32) for field in fields))
