"""Where a run may write."""

from pathlib import Path

from jaxllm.cli.errors import UserError


def check(folder: Path, argument: str = "--out") -> None:
    """Raise UserError for a folder that cannot hold a run.

    Orbax looks for its parts with a glob over the whole path: below a folder with brackets in its name it finds none,
    and a checkpoint that cannot be read comes out without an error.
    """
    if "[" in str(folder.absolute()):
        raise UserError(
            argument,
            str(folder.absolute()),
            "a path without '[', which checkpoints cannot be read from",
            "Choose another folder.",
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(argument, str(folder), "a folder; this is a file")
