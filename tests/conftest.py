"""Shared test set-up: one persistent compilation cache, seeds from the commit, float32 products kept exact."""

import os
import pathlib
import random
import subprocess
import zlib

import jax
import pytest
from hypothesis import HealthCheck, settings

_HOME = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
# Through jax.config for this process, since jax is imported already; in the environment for those that tests start.
_OPTIONS = {
    "jax_platforms": os.environ.get("JAX_PLATFORMS", "cpu"),
    "jax_compilation_cache_dir": os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(_HOME / "jaxllm" / "tests-xla")
    ),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for _name, _value in _OPTIONS.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)
# The machine-feature check of cached CPU programs logs at error level on every hit; it says nothing of the tests.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# The warpgroups of an interpreted kernel wait for each other in callbacks, each on a thread of XLA's pool: with as few
# threads as a small machine has cores they would wait for ever.
os.environ.setdefault("NPROC", "8")

# Where CI is set hypothesis would draw the same examples for ever; .ci/run gives it the commit as its seed.
settings.register_profile(
    "jaxllm", deadline=None, max_examples=8, derandomize=False, suppress_health_check=list(HealthCheck)
)
settings.load_profile("jaxllm")


def commit_seed() -> int:
    """A seed that changes with every commit, so that CI does not test the same numbers for ever.

    JAXLLM_TEST_SEED gives another, to repeat a failure or to look for one.
    """
    if given := os.environ.get("JAXLLM_TEST_SEED"):
        return int(given)
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


# Of the 65,530 memory maps that Linux allows a process: every compiled program takes some, and past the limit the next
# one ends the process with a segmentation fault.
_MANY_MAPS = 20_000
# Counting them takes milliseconds, so not after every test.
_EVERY = 5
_finished = 0


@pytest.fixture(autouse=True)
def _few_programs():
    """Forgets compiled programs between tests when there are many; the persistent cache has them."""
    global _finished
    yield
    _finished += 1
    maps = pathlib.Path("/proc/self/maps")
    if _finished % _EVERY == 0 and maps.is_file() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption(
        "--share",
        type=float,
        default=1.0,
        help="of every test with more than two cases, run only this share of them, drawn by the commit",
    )


def pytest_collection_modifyitems(config, items):
    share = config.getoption("--share")
    if not 0 < share <= 1:
        raise pytest.UsageError(f"--share {share}: above 0 and at most 1")
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left: set[pytest.Item] = set()
    for name, cases in tests.items():
        if share < 1 and len(cases) > 2:
            left.update(random.Random(f"{commit_seed()} {name}").sample(cases, int(len(cases) * (1 - share))))
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]
