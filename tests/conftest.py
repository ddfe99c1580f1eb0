"""Shared test set-up: one persistent compilation cache, seeds from the commit, float32 products kept exact."""

import os
import pathlib
import subprocess
import zlib

import pytest

_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "jaxllm" / "tests-xla"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# The machine-feature check of cached CPU programs logs at error level on every hit; it says nothing of the tests.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from hypothesis import HealthCheck, settings

settings.register_profile("jaxllm", deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
settings.load_profile("jaxllm")


def commit_seed() -> int:
    """A seed that changes with every commit, so that CI does not test the same numbers for ever."""
    root = pathlib.Path(__file__).parent
    try:
        text = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        text = "no commit"
    return zlib.crc32(text.encode()) % 2**31


@pytest.fixture(scope="session")
def seed() -> int:
    """The commit's seed; printed so that a failure can be repeated."""
    value = commit_seed()
    print(f"seed {value}")
    return value
