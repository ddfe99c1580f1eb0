"""Runs of the command line, in this process and in one of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """What one command line left behind."""

    code: int
    out: str
    err: str


def subprocess_environment() -> dict[str, str]:
    """This checkout's packages, on the CPU, with wide output."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "120",
        "PYTHONWARNINGS": "default",
    }


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command line in this process: fast, and inside the run-time type checks."""
    from jaxllm.cli import environment, main

    # The process keeps its own JAX settings and warning filters; what prepare() sets is tested on its own.
    monkeypatch.setattr(environment, "prepare", lambda *, streams: None)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*argv: str) -> Result:
        try:
            code = main.dispatch(list(argv))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        text = capsys.readouterr()
        return Result(code, text.out, text.err)

    return call


@pytest.fixture
def process() -> Callable[..., Result]:
    """Runs a command line in a process of its own."""

    def call(*argv: str, timeout: float = 300, **environment: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "jaxllm.cli.main", *argv],
            env=subprocess_environment() | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call
