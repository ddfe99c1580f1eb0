"""Killed at any moment, a run goes on as if nothing had happened."""

import json
import os
import pathlib
import random
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
STEPS = 120


def worker(folder, count=0, delay=0.0, *more):
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [
        sys.executable,
        str(HERE / "kill_worker.py"),
        str(folder),
        str(STEPS),
        str(count),
        str(delay),
        *more,
    ]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def final(done):
    assert done.returncode == 0, done.stderr[-2000:]
    return next(line for line in done.stdout.splitlines() if line.startswith("HASH"))


def killed_run_equals_whole_run(tmp_path, seed, kills):
    expected = final(worker(tmp_path / "whole"))
    rng = random.Random(seed)
    folder = tmp_path / "killed"
    for _ in range(kills):
        # Few enough steps each time that the last kill still comes before the end.
        done = worker(folder, rng.randrange(1, 12), rng.uniform(0, 0.03))
        assert done.returncode == -9, done.stderr[-2000:]
    assert final(worker(folder)) == expected
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_five_kills(tmp_path, seed):
    killed_run_equals_whole_run(tmp_path, seed, 5)


@pytest.mark.nightly
def test_fifty_kills(tmp_path, seed):
    for round_ in range(10):
        killed_run_equals_whole_run(tmp_path / str(round_), seed + round_, 5)


@pytest.mark.slow
def test_sigterm_saves_and_resume_ends_like_a_whole_run(tmp_path, seed):
    expected = final(worker(tmp_path / "whole"))
    stopped = worker(tmp_path / "stopped", 1 + seed % (STEPS // 2), 0.0, "term")
    assert stopped.returncode == 0, stopped.stderr[-2000:]
    assert "Stopped by SIGTERM" in stopped.stdout and "go on" in stopped.stdout
    assert final(worker(tmp_path / "stopped")) == expected
