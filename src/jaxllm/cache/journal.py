"""Host state that can be taken back: dictionaries and an order, written through a journal.

The state is small values in containers, never changed in place, so that undoing is putting back what stood there before.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


class Journal:
    """Remembers what each write of an open transaction replaced; outside of one it only writes."""

    def __init__(self) -> None:
        self._log: list[tuple[Any, Any, Any]] = []
        self._depth = 0

    @property
    def open(self) -> bool:
        """Whether a transaction is open."""
        return self._depth > 0

    def put(self, container: Any, key: Any, value: Any) -> None:
        """``container[key] = value`` in a dictionary, a list or a bytearray."""
        if self._depth:
            old = container.get(key, _ABSENT) if isinstance(container, dict) else container[key]
            self._log.append((container, key, old))
        container[key] = value

    def drop(self, container: dict[Any, Any], key: Any) -> None:
        """``del container[key]``."""
        old = container.pop(key)
        if self._depth:
            self._log.append((container, key, old))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is written inside stays only if nothing is raised; one inside another is undone alone."""
        mark = len(self._log)
        self._depth += 1
        try:
            yield
        except BaseException:
            for container, key, old in reversed(self._log[mark:]):
                if old is _ABSENT:
                    del container[key]
                else:
                    container[key] = old
            del self._log[mark:]
            raise
        finally:
            self._depth -= 1
            if not self._depth:
                self._log.clear()


class Order:
    """Keys from the least to the most recently added: a doubly linked list in dictionaries, every verb O(1)."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        # None stands before the first and after the last key.
        self._next: dict[Hashable, Any] = {None: None}
        self._previous: dict[Hashable, Any] = {None: None}

    def __len__(self) -> int:
        return len(self._next) - 1

    def __contains__(self, key: Hashable) -> bool:
        return key is not None and key in self._next

    def __iter__(self) -> Iterator[Any]:
        key = self._next[None]
        while key is not None:
            yield key
            key = self._next[key]

    def backwards(self) -> Iterator[Any]:
        """The keys from the last to the first."""
        key = self._previous[None]
        while key is not None:
            yield key
            key = self._previous[key]

    @property
    def first(self) -> Any:
        """The key that was added the longest ago; None where there is none."""
        return self._next[None]

    def add(self, key: Hashable) -> None:
        """``key``, which is not in the order, becomes its last."""
        self._link(self._previous[None], key)
        self._link(key, None)

    def remove(self, key: Hashable) -> None:
        """Take out ``key``, wherever it stands."""
        self._link(self._previous[key], self._next[key])
        self._journal.drop(self._next, key)
        self._journal.drop(self._previous, key)

    def _link(self, left: Hashable, right: Hashable) -> None:
        self._journal.put(self._next, left, right)
        self._journal.put(self._previous, right, left)
