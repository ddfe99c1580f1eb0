"""The membership of a run, written down as it changes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """The membership of a run as JSON lines."""

    def __init__(self, file: Path | None, tell: Callable[[dict[str, Any]], None] | None = None):
        """Go on at the end of a file.

        Args:
            file: takes the lines; None: nothing is written.
            tell: called with every line.

        Raises:
            OSError: the file cannot be written.
        """
        self._file = None if file is None else open(file, "a", buffering=1)  # noqa: SIM115
        self._tell = tell

    def write(self, event: str, **content: Any) -> None:
        """Add a line; seconds are rounded to milliseconds."""
        row = {"time": time.time(), "event": event, **content}
        row = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
        if self._tell is not None:
            self._tell(row)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
