"""A device in plain Python: every page holds what was written to it, and instructions are applied to the letter.

The value of a token is a hash of its key and of all tokens up to it, as keys and values depend on them: a page that was
overwritten, or that another sequence wrote, reads wrong.
"""

from collections.abc import Sequence
from typing import Any

from jaxllm.cache.sizes import Sizes
from jaxllm.cache.update import Update

GARBAGE = "garbage"


def values(key: Any, tokens: Sequence[int]) -> list[int]:
    """The value of every token; the last one is the recurrent state."""
    state, found = hash(key), []
    for token in tokens:
        state = hash((state, token))
        found.append(state)
    return found


class Device:
    """Pools, tables, open tails and recurrent states, with garbage where nothing was written."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.tables = [[[g.pages] * g.pages_per_slot for _ in range(sizes.slots)] for g in sizes.groups]
        self.pages: list[list[Any]] = [[(GARBAGE,) * sizes.page] * g.pages for g in sizes.groups]
        self.full = [[0] * len(sizes.groups) for _ in range(sizes.slots)]
        self.tails: list[list[list[Any]]] = [[[GARBAGE]] * len(sizes.groups) for _ in range(sizes.slots)]
        self.states: list[Any] = [GARBAGE] * sizes.slots
        self.snapshots: list[Any] = [GARBAGE] * sizes.snapshots

    def apply(self, update: Update) -> None:
        """All sources are read before any target is written; indices past the end are padding."""
        sizes = self.sizes
        old = self.states + self.snapshots
        tails, full, pages = list(self.tails), list(self.full), [list(pool) for pool in self.pages]

        def state(index: int) -> Any:
            return None if index < 0 else old[index]

        for slot, tokens, tail, source in zip(*(each.tolist() for each in update.starts)):
            if slot < sizes.slots:
                self.states[slot] = state(source)
                fresh = [[] for _ in sizes.groups]
                self.tails[slot] = fresh if tail < 0 else [list(each) for each in tails[tail]]
                self.full[slot] = [tokens // sizes.page] * len(fresh) if tail < 0 else list(full[tail])
        for snapshot, source in zip(*(each.tolist() for each in update.saves)):
            if snapshot < sizes.snapshots:
                self.snapshots[snapshot] = state(source)
        for group, copies in enumerate(update.copies):
            for source, target in zip(*(each.tolist() for each in copies)):
                if target < sizes.groups[group].pages:
                    self.pages[group][target] = pages[group][source]
        for group, table in enumerate(update.tables):
            for slot, row in zip(update.slots.tolist(), table.tolist()):
                if slot < sizes.slots:
                    self.tables[group][slot] = row

    def append(self, slot: int, key: Any, tokens: Sequence[int], new: Sequence[int]) -> None:
        """One step: tokens join the open tails, which are sealed into the slot's next page when full.

        Args:
            slot: where.
            key: what the recurrent state begins with.
            tokens: what the recurrent state takes up.
            new: their values.
        """
        for token, value in zip(tokens, new):
            before = self.states[slot]
            self.states[slot] = hash((hash(key) if before is None else before, token))
            for group in range(len(self.sizes.groups)):
                tail = self.tails[slot][group]
                tail.append(value)
                if len(tail) == self.sizes.page:
                    self._write(group, slot, self.full[slot][group], tuple(tail))
                    self.full[slot][group] += 1
                    self.tails[slot][group] = []

    def read(self, slot: int, group: int) -> list[Any]:
        """What the slot stores, in order."""
        row = self.tables[group][slot][: self.full[slot][group]]
        size = self.sizes.groups[group].pages
        found = [self.pages[group][page] if page < size else (GARBAGE,) for page in row]
        return [value for page in found for value in page] + self.tails[slot][group]

    def rewrite(self, slot: int, group: int, kept: Sequence[Any]) -> None:
        """The slot stores ``kept`` instead, in its own pages; what it held behind them is undefined."""
        page = self.sizes.page
        full = len(kept) // page
        for index in range(self.full[slot][group]):
            new = tuple(kept[index * page : (index + 1) * page]) if index < full else (GARBAGE,) * page
            self._write(group, slot, index, new)
        self.full[slot][group] = full
        self.tails[slot][group] = list(kept[full * page :])

    def park(self, slot: int) -> tuple[Any, list[list[Any]]]:
        """Everything that the slot is: its recurrent state, and of every group what it stores."""
        return self.states[slot], [self.read(slot, group) for group in range(len(self.sizes.groups))]

    def unpark(self, slot: int, contents: tuple[Any, list[list[Any]]]) -> None:
        """The inverse, into the pages that the slot has by now."""
        self.states[slot], stored = contents
        for group, values_ in enumerate(stored):
            self.full[slot][group] = len(values_) // self.sizes.page
            self.rewrite(slot, group, values_)

    def run_dead(self, slot: int) -> None:
        """A step that still runs a slot without a request writes all that it can reach."""
        for group, sizes in enumerate(self.sizes.groups):
            for index in range(sizes.pages_per_slot):
                self._write(group, slot, index, (GARBAGE,) * self.sizes.page)
        self.states[slot] = GARBAGE
        self.tails[slot] = [[GARBAGE] for _ in self.sizes.groups]

    def _write(self, group: int, slot: int, index: int, content: tuple) -> None:
        row = self.tables[group][slot]
        if index < len(row) and row[index] < self.sizes.groups[group].pages:
            self.pages[group][row[index]] = content
