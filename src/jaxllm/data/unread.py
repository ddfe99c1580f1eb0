"""Batches whose tokens are read where they are wanted: to plan who trains on what, lengths of documents are enough."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jaxllm.data.packing import RowSource, empty_row


@dataclass(frozen=True, eq=False)
class UnreadBatch:
    """A whole batch without its tokens and targets.

    Attributes:
        source: of the rows.
        rows: i64[B], their global indices; -1: padding.
        segment_ids: i32[B, T].
        positions: i32[B, T].
        loss_mask: f32[B, T].
    """

    source: RowSource
    rows: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray

    @classmethod
    def of(cls, source: RowSource, rows: Iterable[int]) -> "UnreadBatch":
        """The batch of some rows of a source."""
        index = np.asarray(list(rows), np.int64)
        empty = empty_row(source.seq_len, source.depths)
        marks = [empty if row < 0 else source.marks(int(row)) for row in index]
        names = "segment_ids", "positions", "loss_mask"
        return cls(source, index, *(np.stack([row[name] for row in marks]) for name in names))

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return len(self.rows), self.source.seq_len

    @property
    def depths(self) -> int:
        """Q; targets 1 .. Q steps ahead."""
        return self.source.depths

    def read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of some places of documents; those of no others are read.

        Args:
            places: i64[n], row * T + column.

        Returns:
            tokens i32[n] and targets i32[n, Q], -1 where there is none.
        """
        tokens = np.zeros(len(places), np.int32)
        targets = np.full((len(places), self.depths), -1, np.int32)
        row, column = np.divmod(places, self.source.seq_len)
        order = np.argsort(row, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(row[order])) + 1) if len(order) else ():
            tokens[at], targets[at] = self.source.read(int(self.rows[row[at[0]]]), column[at])
        return tokens, targets
