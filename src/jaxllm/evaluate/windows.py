"""Which tokens are scored with which context: every token of a document exactly once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.config import ConfigError, require


@dataclass(frozen=True, eq=False)
class Window:
    """A run of tokens of which the last ones are scored.

    Attributes:
        tokens: int[L]; L is at least 2.
        first: tokens ``first ..`` are scored, each given all tokens before it in the window; at least 1.
    """

    tokens: np.ndarray
    first: int

    def __post_init__(self) -> None:
        require(
            1 <= self.first < len(self.tokens),
            "first",
            self.first,
            f"must lie in 1 .. {len(self.tokens) - 1}",
        )

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.tokens) - self.first


def strided_windows(tokens: Sequence[int] | np.ndarray, window: int, stride: int) -> Iterator[Window]:
    """Windows over one document such that every token but the first is scored exactly once.

    A token has all tokens before it as context as far as ``window`` allows, and never fewer than ``window - stride``
    of those that exist.

    Args:
        tokens: the document; fewer than 2 tokens give no window.
        window: most tokens of a window, context and scored ones together.
        stride: tokens between the starts of two windows; ``window - 1`` is the cheapest, 1 the most exact.

    Raises:
        ConfigError: a window below 2, or a stride outside 1 .. window - 1.
    """
    require(window >= 2, "window", window, "must be at least 2 tokens: one of context, one that is scored")
    if not 1 <= stride < window:
        raise ConfigError(
            f"stride={stride!r}: must lie in 1 .. {window - 1} (window - 1), so that every token has some context"
        )
    ids = np.asarray(tokens, np.int32)
    done = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        if end > done:
            yield Window(ids[begin:end], done - begin)
            done = end
        if end == len(ids):
            return


def bucket(length: int, least: int = 64) -> int:
    """The smallest power of two, or three quarters of one, that holds ``length``: few shapes to compile."""
    size = least
    while size < length:
        size *= 2
    return size * 3 // 4 if size > least and length <= size * 3 // 4 else size


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Items first-fit, longest first, into rows of ``capacity``; the indices in each row.

    Args:
        lengths: of the items; none above ``capacity``.
        capacity: of a row.
    """
    rows: list[list[int]] = []
    # Only rows that could still hold the shortest item are looked at.
    open_rows: list[list[int]] = []
    least = min(lengths, default=0)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((row for row in open_rows if row[0] >= lengths[index]), None)
        if place is None:
            rows.append([])
            place = [capacity, len(rows) - 1]
            open_rows.append(place)
        place[0] -= lengths[index]
        rows[place[1]].append(index)
        if place[0] < least:
            open_rows.remove(place)
    return rows
