"""What the device has to do before its next step, as small arrays: the host's decisions, ready for one jitted update.

Every instruction reads the arrays as they are before the update: all sources are read, then all targets are written.
Indices past the end (a slot S, a page P, a snapshot R) are padding, to be dropped by a scatter with mode="drop".
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.cache.journal import Journal

_LEAST_ROWS = 8


class Copies(NamedTuple):
    """Pages to copy in every layer of a group, with their scales and the policy's ``per_page`` arrays.

    Attributes:
        source: i32[c].
        target: i32[c], none twice.
    """

    source: np.ndarray
    target: np.ndarray


class Starts(NamedTuple):
    """Slots that begin a sequence.

    Attributes:
        slots: i32[m], none twice.
        tokens: i32[m], tokens that the sequence has already: its shared prefix, or all of a fork's.
        tail: i32[m], slot whose open tails, lengths and per-slot policy arrays are copied; -1: tails are empty, every
            group stores ``tokens`` sealed tokens, and the policy's per-slot arrays are zeroed.
        state: i32[m], where recurrent and convolution states come from: -1 zeros, 0 .. S - 1 a slot, S + r snapshot r.
    """

    slots: np.ndarray
    tokens: np.ndarray
    tail: np.ndarray
    state: np.ndarray


class Saves(NamedTuple):
    """Snapshots to write.

    Attributes:
        snapshots: i32[r], none twice.
        state: i32[r], as in :class:`Starts`.
    """

    snapshots: np.ndarray
    state: np.ndarray


class Update(NamedTuple):
    """Instructions for the device, a pytree.

    Attributes:
        slots: i32[m], slots with new table rows, none twice.
        tables: for each group i32[m, n], their rows; P past the pages that the slot holds, so that a write there is
            dropped.
        copies: for each group the pages to copy.
        starts: slots that begin.
        saves: snapshots to write.
    """

    slots: np.ndarray
    tables: tuple[np.ndarray, ...]
    copies: tuple[Copies, ...]
    starts: Starts
    saves: Saves

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (len(self.slots) or len(self.saves.snapshots) or any(len(c.target) for c in self.copies))

    def padded(self, slots: int, pages: Sequence[int], snapshots: int) -> "Update":
        """The same with lengths that are powers of two, so that few programs are compiled.

        Rows, starts and saves get one common length of at least 8 (or S), except that starts and saves stay without any
        where there are none, since their states cost far more than rows; copies of all groups get another length.

        Args:
            slots: S.
            pages: P of each group.
            snapshots: R.
        """
        begun = max(len(self.starts.slots), len(self.saves.snapshots))
        rows = _power_of_two(max(len(self.slots), begun, min(slots, _LEAST_ROWS)))
        begun = rows if begun else 0
        count = _power_of_two(max((len(each.target) for each in self.copies), default=0))
        return Update(
            slots=_pad(self.slots, rows, slots),
            tables=tuple(_pad(table, rows, size) for table, size in zip(self.tables, pages)),
            copies=tuple(
                Copies(_pad(each.source, count, 0), _pad(each.target, count, size))
                for each, size in zip(self.copies, pages)
            ),
            starts=Starts(
                _pad(self.starts.slots, begun, slots), *(_pad(each, begun, -1) for each in self.starts[1:])
            ),
            saves=Saves(_pad(self.saves.snapshots, begun, snapshots), _pad(self.saves.state, begun, -1)),
        )


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length() if length else 0


def _pad(array: np.ndarray, length: int, value: int) -> np.ndarray:
    rest = np.full((length - len(array), *array.shape[1:]), value, np.int32)
    return np.concatenate([array, rest])


class Pending:
    """Instructions gathered since the last update. A source that is itself a target still to be written is replaced by
    its own source, so that the order in which they were gathered does not matter any more."""

    def __init__(self, groups: int, slots: int, journal: Journal) -> None:
        self.rows: dict[int, None] = {}
        self._copies: list[dict[int, int]] = [{} for _ in range(groups)]
        self._starts: dict[int, tuple[int, int, int]] = {}
        self._saves: dict[int, int] = {}
        self._slots = slots
        self._journal = journal

    def row(self, slot: int) -> None:
        """The slot's pages have changed."""
        self._journal.put(self.rows, slot, None)

    def copy(self, group: int, source: int, target: int) -> None:
        """``target``, which was free, becomes a copy of ``source``."""
        copies = self._copies[group]
        self._journal.put(copies, target, copies.get(source, source))

    def start(self, slot: int, tokens: int, snapshot: int) -> None:
        """``slot`` begins with empty tails, and the state of ``snapshot``; -1: zeros."""
        state = -1 if snapshot < 0 else self._saves.get(snapshot, self._slots + snapshot)
        self._journal.put(self._starts, slot, (tokens, -1, state))

    def fork(self, slot: int, tokens: int, parent: int) -> None:
        """``slot`` begins as a copy of ``parent``."""
        _, tail, state = self._starts.get(parent, (tokens, parent, parent))
        self._journal.put(self._starts, slot, (tokens, tail, state))

    def save(self, snapshot: int, slot: int) -> None:
        """``snapshot`` becomes the recurrent state of ``slot``."""
        _, _, state = self._starts.get(slot, (0, slot, slot))
        self._journal.put(self._saves, snapshot, state)

    def end(self, slot: int) -> None:
        """The slot is free: nothing has to begin there."""
        if slot in self._starts:
            self._journal.drop(self._starts, slot)

    def take(self, tables: Sequence[np.ndarray]) -> Update:
        """Everything gathered, which is forgotten here. ``tables``: of each group the rows of ``rows``, in its order."""
        update = Update(
            slots=_array(self.rows),
            tables=tuple(tables),
            copies=tuple(Copies(_array(each.values()), _array(each)) for each in self._copies),
            starts=Starts(
                _array(self._starts),
                *(_array(start[field] for start in self._starts.values()) for field in range(3)),
            ),
            saves=Saves(_array(self._saves), _array(self._saves.values())),
        )
        for each in (self.rows, self._starts, self._saves, *self._copies):
            each.clear()
        return update


def _array(values) -> np.ndarray:
    return np.fromiter(values, np.int32)
