"""``jaxllm launch`` before anything is started: its command line, and where it writes."""

import json
import os
import sys
from pathlib import Path

import pytest

from jaxllm.cli import launch
from jaxllm.cli.errors import UserError

REFUSED = {
    "one worker": (["--workers", "1", "--", "jaxllm", "train"], ["--workers", "at least 2"]),
    "no command": (["--workers", "2"], ["command", "after `--`"]),
    "no time": (["--workers", "2", "--heartbeat", "0", "--", "true"], ["--heartbeat", "above 0"]),
    "fewer than no restarts": (["--workers", "2", "--max-restarts", "-1", "--", "true"], ["--max-restarts"]),
    "no such program": (["--workers", "2", "--", "jaxlm", "train"], ["jaxlm", "can be found"]),
    "no run": (["--workers", "2", "--", "jaxllm", "train", "none.yaml"], ["--folder"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_started_is_refused_without_a_traceback(name, cli):
    argv, words = REFUSED[name]
    shown = cli("launch", *argv)
    assert shown.code == 2 and "Traceback" not in shown.err
    assert all(word in shown.err for word in words)


def test_the_folder_is_that_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: quickstart\nout: runs/mine\n")
    Path("bare.yaml").write_text("model: quickstart\n")
    train = ["jaxllm", "train"]
    assert launch.folder_of([*train, "run.yaml"]) == Path("runs/mine")
    assert launch.folder_of([*train, "bare.yaml"]) == Path("runs/train")
    assert launch.folder_of([*train, "run.yaml", "--out", "other"]) == Path("other")
    assert launch.folder_of([*train, "run.yaml", "--set", "out=third"]) == Path("third")
    with pytest.raises(UserError, match="folder"):
        launch.folder_of(train)


def test_what_stands_after_the_dashes_is_the_workers():
    parsed = launch.parse(["--workers", "3", "--", "jaxllm", "train", "x.yaml", "--", "y"])
    assert parsed.args.workers == 3
    assert parsed.command == ("jaxllm", "train", "x.yaml", "--", "y")


def test_a_command_that_does_not_join_is_refused(tmp_path, process):
    shown = process("launch", "--workers", "2", "--folder", str(tmp_path), "--", "true")
    assert shown.code == 2 and "ended without joining" in shown.err and "Traceback" not in shown.err


def test_what_is_refused_within_a_world_is_not_tried_again(tmp_path, process):
    refuses = "from parallel.failover.membership import Member; Member().enter(None); raise SystemExit(2)"
    command = [sys.executable, "-c", refuses]
    shown = process("launch", "--workers", "2", "--folder", str(tmp_path), "--", *command)
    assert shown.code == 2 and "Traceback" not in shown.err
    rows = [json.loads(line) for line in (tmp_path / "membership.jsonl").read_text().splitlines()]
    assert any(row["event"] == "world" for row in rows)
    assert [row["restarts"] for row in rows if row["event"] == "started"] == [0, 0]


def test_programs_are_kept_in_the_runs_folder_unless_the_user_keeps_them_elsewhere(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    found = launch.environment(tmp_path / "run")
    assert found["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "run" / "programs")
    assert found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "7" and found["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert launch.environment(tmp_path / "run")["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
