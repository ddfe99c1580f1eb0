"""Data-parallel training equals training on one device."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def test_eight_devices_equal_one():
    root = HERE.parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, str(HERE / "sharded_worker.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "EQUAL" in done.stdout
