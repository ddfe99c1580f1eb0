"""Documents cut into blocks, and short blocks packed into slots."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Blocks:
    """Pieces of documents, in the order of the packed tokens; a block never holds tokens of two documents.

    Attributes:
        size: tokens of a full block; every block but a document's last is full.
        document: i64[K], the document of each block, counted from 0.
        index: i64[K], the block's place in its document.
        start: i64[K], its first token in the concatenation of all documents.
        length: i64[K], its tokens.
        window: keys that a query sees at most, itself included; None: all before it in its document.
    """

    size: int
    document: np.ndarray
    index: np.ndarray
    start: np.ndarray
    length: np.ndarray
    window: int | None = None

    def __len__(self) -> int:
        return len(self.document)

    @property
    def work(self) -> np.ndarray:
        """i64[K]: (query, key) pairs of tokens that attention needs for a block's queries."""
        begin = self.index * self.size
        return _sum_to(begin + self.length, self._most) - _sum_to(begin, self._most)

    @property
    def own(self) -> np.ndarray:
        """i64[K]: those of them whose keys are in the block itself."""
        return _sum_to(self.length, self._most)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """i64[M] each: all pairs of a query block and an earlier key block of which some query sees some key."""
        number, count = np.arange(len(self)), self.index
        if self.window is not None:
            # Of i - j blocks apart the nearest query and key are (i - j - 1) * size + 1 tokens apart.
            count = np.minimum(count, -(-(self.window - 1) // self.size))
        query = np.repeat(number, count)
        key = (
            np.arange(len(query))
            - np.repeat(np.cumsum(count) - count, count)
            + np.repeat(number - count, count)
        )
        return query, key

    def seen(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """i64[M]: pairs of tokens that attention needs of each pair of blocks; ``key`` are full, as all that come earlier."""
        apart, size = (self.index[query] - self.index[key]) * self.size, self.size
        # The x-th query, from 1 on, is too far from first + x of the keys; from none at least, from all at most.
        first = apart - self._most
        missed = _sum_to(np.maximum(first + self.length[query], 0), size) - _sum_to(
            np.maximum(first, 0), size
        )
        return self.length[query] * size - missed

    @property
    def _most(self) -> int:
        return 2**31 if self.window is None else self.window

    @property
    def tokens(self) -> int:
        """Tokens of all blocks."""
        return int(self.length.sum())


def cut(lengths: Sequence[int] | np.ndarray, size: int, window: int | None = None) -> Blocks:
    """Cut documents into blocks of ``size`` tokens; what is left at a document's end, or a short document, is one block.

    Args:
        lengths: tokens of each document.
        size: tokens of a block.
        window: of :class:`Blocks`.

    Raises:
        ValueError: no documents, a length, a size or a window below 1, or lengths that are not whole numbers.
    """
    if size < 1:
        raise ValueError(f"block={size}: must be at least 1 token")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be None or at least 1")
    given = np.asarray(lengths)
    if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"lengths of shape {given.shape} and type {given.dtype}: must be one whole number for each document, "
            "of at least one document"
        )
    if given.min() < 1:
        at = int(given.argmin())
        raise ValueError(f"lengths[{at}]={given[at]}: must be at least 1 token")
    given = given.astype(np.int64)
    counts = -(-given // size)
    document = np.repeat(np.arange(len(given)), counts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.cumsum(given) - given)[document] + index * size
    length = np.minimum(size, given[document] - index * size)
    return Blocks(size, document, index, start, length, window)


def _sum_to(count: np.ndarray, most: int) -> np.ndarray:
    """1 + 2 + ... + count, each at most ``most``."""
    below = np.minimum(count, most)
    return below * (below + 1) // 2 + (count - below) * most


def pack(length: np.ndarray, size: int, group: np.ndarray | None = None) -> np.ndarray:
    """Share slots of ``size`` tokens between blocks: best fit, longest first.

    Args:
        length: i64[K], tokens of each block, at most ``size``.
        size: tokens of a slot.
        group: i64[K]; blocks of different groups share no slot. None: one group.

    Returns:
        i64[K], the slot of each block, counted from 0 over all groups in their order.
    """
    group = np.zeros(len(length), np.int64) if group is None else group
    order = np.lexsort((-length, group))
    slots = [0] * len(length)
    room: list[tuple[int, int]] = []
    current, made = None, 0
    for block, tokens, of in zip(order.tolist(), length[order].tolist(), group[order].tolist()):
        if of != current:
            current, room = of, []
        at = bisect_left(room, (tokens, -1))
        if at == len(room):
            left, slot = size, made
            made += 1
        else:
            left, slot = room.pop(at)
        slots[block] = slot
        if left > tokens:
            insort(room, (left - tokens, slot))
    return np.asarray(slots, np.int64)
