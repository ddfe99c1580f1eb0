"""What needs eight virtual devices, whose number must be set before JAX starts: a process for each file."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def run(file: str, marker: str) -> None:
    """Run the tests of a file that pytest does not collect by itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-m", marker, str(HERE / "eight_devices" / file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


FILES = ["check_exchange.py", "check_attention.py", "check_programs.py", "check_shares.py"]


@pytest.mark.parametrize("file", FILES)
def test_on_eight_devices(file):
    run(file, "not slow and not nightly")


@pytest.mark.slow
def test_more_workers_and_shapes():
    run("check_attention.py", "slow")


@pytest.mark.nightly
def test_all_workers_and_shapes():
    run("check_attention.py", "nightly")
