"""A user's mistake as one friendly message: the argument, what was given, what is allowed, what to do."""

import sys
from typing import Any


class UserError(ValueError):
    """Something the person at the command line can put right; shown without a traceback, exit code 2.

    Attributes:
        argument: the flag, file or field at fault.
        given: what stood there.
        allowed: what may stand there.
        hint: what to do next.
    """

    def __init__(self, argument: str, given: Any, allowed: str, hint: str = ""):
        super().__init__(f"{argument}={given!r}: {allowed}" + (f". {hint}" if hint else ""))
        self.argument, self.given, self.allowed, self.hint = argument, given, allowed, hint


def explain(error: BaseException) -> list[str] | None:
    """Lines to show for a user's mistake; None for anything else, which keeps its traceback."""
    if isinstance(error, UserError):
        given = "missing" if error.given is None else f"got {error.given!r}"
        lines = [f"{error.argument}: {given}", f"Allowed: {error.allowed}"]
        return lines + ([error.hint] if error.hint else [])
    if isinstance(error, OSError) and error.filename is not None and isinstance(error, _PATH_ERRORS):
        return [
            f"{error.filename}: {(error.strerror or type(error).__name__).lower()}",
            "Check the path and its permissions.",
        ]
    if isinstance(error, _library_errors()):
        return str(error).splitlines()
    return None


_PATH_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


def _library_errors() -> tuple[type[BaseException], ...]:
    """Errors that the library raises for bad input; only modules that are loaded can have raised one."""
    found = []
    for module, name in (
        ("jaxllm.config", "ConfigError"),
        ("jaxllm.data.errors", "DataError"),
        ("jaxllm.hf.tensors", "CheckpointError"),
        ("jaxllm.train.checkpoint", "CheckpointError"),
        ("jaxllm.train.memory", "OutOfMemory"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)
