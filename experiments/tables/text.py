"""What all tables are written with."""

from collections.abc import Iterable


class TableError(ValueError):
    """A table that cannot be made: an unknown kind, or a file without what the kind needs."""


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], right: Iterable[int] = ()) -> str:
    """A Markdown table; the columns in ``right`` hold numbers."""
    header, right = list(header), set(right)
    rule = ["---:" if index in right else "---" for index in range(len(header))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *map(list, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """A figure with separators, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"
