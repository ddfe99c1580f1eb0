"""Documents packed into rows; every row is a pure function of (seed, global row index).

An epoch is the documents in a seeded order, end to end, cut into rows of T tokens: nothing is wasted but the tail of the
last row. The rows of an epoch are then put in a seeded order of their own, because consecutive rows often hold pieces of
the same long document.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jaxllm.data.errors import DataError
from jaxllm.data.order import seeded_order
from jaxllm.data.tokens import TokenCorpus

# Longer than any run, and still exact in a C long: rows are addressed without an end.
ENDLESS = 1 << 60


class _Laid(NamedTuple):
    """What a row is made of, known from the documents' lengths: its places in the corpus, where each one's document ends,
    its segment and its position there; i64[used] each, ``used`` of the T tokens being documents.
    """

    source: np.ndarray
    end: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


class RowSource:
    """Rows of packed documents by global row index; row g belongs to epoch g // rows_per_epoch.

    A row holds segments 1, 2, ...; a segment is a document or, where a row's edge cuts it, a consecutive piece of one,
    whose positions start at 0 again. Every token of the corpus stands in exactly one row of each epoch, and is the
    target of exactly one position if it is not the first of its document: the last token of a piece has the first of the
    next piece as its target.
    """

    def __init__(
        self, corpus: TokenCorpus, seq_len: int, *, seed: int = 0, depths: int = 1, shuffle: bool = True
    ):
        """Makes the source; reads no tokens.

        Args:
            corpus: the documents.
            seq_len: T, tokens per row.
            seed: of the order of documents and rows in each epoch.
            depths: Q; targets 1 .. Q steps ahead.
            shuffle: False keeps documents and rows in corpus order.
        """
        if seq_len < 1 or depths < 1:
            raise DataError(f"seq_len and depths: got {seq_len} and {depths}; both must be at least 1")
        self.corpus, self.seq_len, self.seed, self.depths, self.shuffle = (
            corpus,
            seq_len,
            seed,
            depths,
            shuffle,
        )
        self.rows_per_epoch = -(-len(corpus) // seq_len)
        # A batch can straddle two epochs, and a prefetch thread can be one batch ahead of a reader.
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def __len__(self) -> int:
        return ENDLESS

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(documents in epoch order int64[D], their first places in the stream int64[D + 1], rows in order int64[R])."""
        if self.shuffle:
            order = seeded_order(self.corpus.n_documents, self.seed, epoch, 0)
            rows = seeded_order(self.rows_per_epoch, self.seed, epoch, 1)
        else:
            order, rows = np.arange(self.corpus.n_documents), np.arange(self.rows_per_epoch)
        return order, np.concatenate([[0], np.cumsum(self.corpus.lengths[order])]), rows

    def _laid(self, index: int) -> _Laid:
        epoch, slot = divmod(int(index), self.rows_per_epoch)
        order, starts, rows = self._epoch(epoch)
        low = int(rows[slot]) * self.seq_len
        high = min(low + self.seq_len, len(self.corpus))
        first = int(np.searchsorted(starts, low, side="right")) - 1
        last = int(np.searchsorted(starts, high, side="left")) - 1
        places, documents = np.arange(first, last + 1), order[first : last + 1]
        piece_low = np.maximum(starts[places], low)
        piece_length = np.minimum(starts[places + 1], high) - piece_low
        stream = np.arange(low, high)
        begin = self.corpus.offsets[documents] - starts[places]
        return _Laid(
            source=stream + np.repeat(begin, piece_length),
            end=np.repeat(self.corpus.offsets[documents + 1], piece_length),
            segment_ids=np.repeat(np.arange(1, len(places) + 1), piece_length),
            positions=stream - np.repeat(piece_low, piece_length),
        )

    def _read(self, source: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.corpus.tokens[source].astype(np.int32)
        targets = np.full((len(source), self.depths), -1, np.int32)
        for depth in range(self.depths):
            ahead = source + depth + 1
            known = ahead < end
            targets[known, depth] = self.corpus.tokens[ahead[known]]
        return tokens, targets

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`.

        Returns:
            tokens, segment_ids, positions i32[T]; targets i32[T, Q], -1 where there is none; loss_mask f32[T], 1 where
            the next token is a target. Padding has segment 0 and token 0.
        """
        laid = self._laid(index)
        row, used = empty_row(self.seq_len, self.depths), len(laid.source)
        row["tokens"][:used], row["targets"][:used] = self._read(laid.source, laid.end)
        return row | self._marks(laid)

    def marks(self, index: int) -> dict[str, np.ndarray]:
        """What row `index` has beside tokens and targets; reads no tokens."""
        return self._marks(self._laid(index))

    def _marks(self, laid: _Laid) -> dict[str, np.ndarray]:
        empty, used = empty_row(self.seq_len, self.depths), len(laid.source)
        marks = {name: empty[name] for name in ("segment_ids", "positions", "loss_mask")}
        marks["segment_ids"][:used] = laid.segment_ids
        marks["positions"][:used] = laid.positions
        marks["loss_mask"][:used] = laid.source + 1 < laid.end
        return marks

    def read(self, index: int, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """tokens i32[n] and targets i32[n, Q] of n columns of row `index`, none of them padding; reads no others."""
        laid = self._laid(index)
        return self._read(laid.source[columns], laid.end[columns])


def empty_row(seq_len: int, depths: int) -> dict[str, np.ndarray]:
    """A row of padding, in the form of `RowSource`'s rows."""
    return {
        "tokens": np.zeros(seq_len, np.int32),
        "segment_ids": np.zeros(seq_len, np.int32),
        "positions": np.zeros(seq_len, np.int32),
        "targets": np.full((seq_len, depths), -1, np.int32),
        "loss_mask": np.zeros(seq_len, np.float32),
    }
