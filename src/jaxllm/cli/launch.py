"""``jaxllm launch``: the supervisor of a run whose workers may die."""

import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.cli.errors import UserError

EXAMPLE = "For example: jaxllm launch --workers 4 -- jaxllm train run.yaml --failover mecefo"


@dataclass(frozen=True)
class Args:
    """Start a training command as several workers of this host, and keep the run going as they die, hang and come back.

    The command follows after `--`; it must be a `jaxllm train` with --failover. Worker 0 writes to the terminal, the others
    to worker-N.log in the run's folder, where membership.jsonl tells who was lost when, and how long it took to go on.

    Attributes:
        workers: processes; each has its share of the devices.
        max_restarts: of each worker, after which its place stays empty.
        heartbeat: seconds without a sign of life and without work after which a worker counts as hung and is killed.
        stall: seconds that a worker may be silent at work, or behind the others, before it counts as hung.
        collective_timeout: seconds that a collective may take on CPUs; must exceed what workers differ by in compiling.
        host: address at which the supervisor and the coordination services listen.
        folder: instead of the run's.
    """

    workers: int
    max_restarts: int = 10
    heartbeat: float = 10.0
    stall: float = 180.0
    collective_timeout: int = 60
    host: str = "127.0.0.1"
    folder: Path | None = None


@dataclass(frozen=True)
class Launch:
    """The supervisor's own arguments, and the command of the workers."""

    args: Args
    command: tuple[str, ...]


def parse(argv: Sequence[str]) -> Launch:
    """What stands before ``--``, and the command after it."""
    import tyro

    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    args = tyro.cli(Args, prog="jaxllm launch", args=words[:at], config=(tyro.conf.FlagCreatePairsOff,))
    return Launch(args, tuple(words[at + 1 :]))


def folder_of(command: Sequence[str]) -> Path:
    """The run's folder, as ``jaxllm train`` will find it; nothing is imported for that.

    Raises:
        UserError: the command does not tell.
    """
    import yaml

    words = list(command)
    for first, second in itertools.pairwise(words):
        if first == "--out":
            return Path(second)
    for word in words:
        name, _, value = word.partition("=")
        if name in ("out", "--out") and value:
            return Path(value)
    for word in words:
        if word.endswith((".yaml", ".yml")) and Path(word).is_file():
            try:
                content = yaml.safe_load(Path(word).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                break
            if isinstance(content, dict) and content.get("out"):
                return Path(str(content["out"]))
            return Path("runs/train")
    raise UserError(
        "--folder", None, "a folder for membership.jsonl", "The command names no run.yaml that exists."
    )


def check(launch: Launch) -> None:
    """Raise UserError for what cannot be started."""
    args, command = launch.args, launch.command
    if not command:
        raise UserError("command", None, "the command of a worker, after `--`", EXAMPLE)
    if args.workers < 2:
        raise UserError("--workers", args.workers, "at least 2: with one process nobody takes over", EXAMPLE)
    for name in ("heartbeat", "stall", "collective_timeout"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')}", getattr(args, name), "seconds, above 0")
    if args.max_restarts < 0:
        raise UserError("--max-restarts", args.max_restarts, "a number of at least 0")
    if command[0] != "jaxllm" and shutil.which(command[0]) is None:
        raise UserError("command", command[0], "a program that can be found", EXAMPLE)


def _tell(row: dict[str, Any]) -> None:
    event = row["event"]
    if event == "lost":
        text = f"worker {row['worker']} lost: {row['why']}, noticed within {row['detection_s']:.2f} s"
    elif event == "recovered" and row["why"]:
        members = ", ".join(map(str, row["members"]))
        text = f"workers {members} go on after {row['recovery_s']:.2f} s, from step {row['step']}"
    elif event == "refused":
        text = f"worker {row['worker']}: {row['why']}; has the command --failover?"
    else:
        return
    print(f"launch: {text}", file=sys.stderr, flush=True)


def run(launch: Launch) -> int:
    """Supervise until the workers are done; the exit code is theirs."""
    check(launch)
    args = launch.args
    from jaxllm.cli import run_folder
    from parallel.failover.supervisor import SupervisorOptions, supervise

    folder = args.folder or folder_of(launch.command)
    run_folder.check(folder, "--folder" if args.folder else "out")
    options = SupervisorOptions(
        args.workers,
        max_restarts=args.max_restarts,
        heartbeat=args.heartbeat,
        stall=args.stall,
        collective_timeout=args.collective_timeout,
        host=args.host,
    )
    command = list(launch.command)
    if command[0] == "jaxllm":
        # That of this interpreter, wherever it is installed.
        command[:1] = [sys.executable, "-m", "jaxllm.cli.main"]
    return supervise(command, options, folder=folder, environment=environment(folder), tell=_tell)


def environment(folder: Path) -> dict[str, str]:
    """Of the workers: programs of the run's worlds are kept in its folder, unless the user keeps them elsewhere."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(folder.absolute() / "programs")}
    kept |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return kept | os.environ
