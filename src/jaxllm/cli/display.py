"""What all subcommands print with: numbers with units, plain tables."""

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

MISSING = "-"


def make_console(*, quiet: bool = False) -> Console:
    """A console on standard output; tables that go into a file or pipe keep a readable width.

    Args:
        quiet: show nothing, for processes beside the first.
    """
    # Markup would read "jaxllm[cuda12]" or a path with brackets as a style and swallow it.
    console = Console(highlight=False, markup=False, quiet=quiet)
    drawn = console.is_terminal and not console.is_dumb_terminal
    return console if drawn else Console(highlight=False, markup=False, width=100, quiet=quiet)


def bold(text: str) -> Text:
    """Bold text."""
    return Text(text, style="bold")


def table(*columns: str, title: str | None = None, right: Iterable[int] = ()) -> Table:
    """A light table; columns whose index is in ``right`` hold numbers."""
    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    right = set(right)
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index in right else "left", overflow="fold")
    return made


def count(value: int | float) -> str:
    """A whole number with separators: 3,412,992."""
    return f"{value:,.0f}"


def short(value: int | float) -> str:
    """A number of things in three digits: 3.41 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def size(value: int | float) -> str:
    """Bytes in binary units: 1.23 MiB."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: int | float | None) -> str:
    """Time for people: 0.42 s, 12.3 s, 4:05 min, 2:13:20 h."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def number(value: int | float | None, digits: int = 3) -> str:
    """A figure with fixed digits, or a dash where there is none."""
    return MISSING if value is None else f"{value:.{digits}f}"
