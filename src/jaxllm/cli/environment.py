"""What the command line sets before JAX is imported. The library itself never touches the environment."""

import logging
import os
import warnings
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder of jaxllm (``XDG_CACHE_HOME`` is obeyed)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm"


def prepare() -> None:
    """Persistent compilation cache, and no noise from the libraries below; whatever the user has set stays.

    Called before any subcommand is imported, so it must not import JAX itself.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # XLA logs a CPU feature comparison at error level on each cache hit.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
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
