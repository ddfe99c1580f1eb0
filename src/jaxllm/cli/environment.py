"""What the command line sets before JAX is imported. The library itself never touches the environment."""

import ctypes
import logging
import os
import re
import warnings
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder of jaxllm (``XDG_CACHE_HOME`` is obeyed)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm"


# mallopt(3): parameter, value, and the variable with which a user sets it.
# One arena, memory from the heap only, and what is freed stays with the process.
_KEEP = (
    (-8, 1, "MALLOC_ARENA_MAX"),
    (-4, 0, "MALLOC_MMAP_MAX_"),
    (-1, 2**31 - 1, "MALLOC_TRIM_THRESHOLD_"),
    (-2, 2**28, "MALLOC_TOP_PAD_"),
)
# One arena, and blocks of a mebibyte go back to the system one by one. Unless it is set, glibc raises that limit to the
# largest block that was ever freed, up to 32 MiB, and smaller ones then lie among what is still used.
_RETURN = ((-8, 1, "MALLOC_ARENA_MAX"), (-3, 2**20, "MALLOC_MMAP_THRESHOLD_"))


def _tune(options: tuple[tuple[int, int, str], ...]) -> bool:
    names = {name for _, _, name in (*_KEEP, *_RETURN)}
    if names & set(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        # No glibc: macOS, musl, Windows.
        return False
    return all(mallopt(parameter, value) for parameter, value, _ in options)


def keep_freed_memory() -> bool:
    """Let glibc keep what XLA frees; True where that was possible and the user has not tuned it.

    XLA:CPU takes its scratch memory anew for every step. glibc maps it from the system and gives it back each time,
    and the page faults of that can cost a training step a third of its time (docs/decisions/0007). Must come before the
    first thread: arenas are made with threads.
    """
    return _tune(_KEEP)


def return_freed_memory() -> bool:
    """Let glibc give back what is freed, for commands that stream more than they hold; else as the other."""
    return _tune(_RETURN)


def prepare(*, streams: bool = False) -> None:
    """Persistent compilation cache, and no noise from the libraries below; whatever the user has set stays.

    Called before any subcommand is imported, so it must not import JAX itself.

    Args:
        streams: the subcommand moves more bytes than it holds, and runs no steps.
    """
    (return_freed_memory if streams else keep_freed_memory)()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # XLA logs a CPU feature comparison at error level on each cache hit.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    simulated = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if simulated:
        # A simulated device takes a thread for every collective that it waits in, and may wait in several at once: with
        # one thread each, devices that begin them in different orders would wait for each other for ever.
        os.environ.setdefault("NPROC", str(max(4 * int(simulated[-1]), os.cpu_count() or 1)))
    for name in ("absl", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A newcomer can do nothing about a deprecation inside a dependency; the tests turn warnings into errors.
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def compile_cache_folder() -> Path:
    """Where compiled programs are kept between runs."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder() / "xla")


def compile_cache_bytes() -> int:
    """Size of the persistent compilation cache, in bytes."""
    folder = compile_cache_folder()
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file()) if folder.is_dir() else 0
