"""Runs of ``elastic_worker.py`` whose workers are killed."""

import json
import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE = 600


def elastic(
    folder: pathlib.Path,
    method: str,
    kill: tuple[int, ...] = (),
    *,
    workers: int = 3,
    steps: int = 40,
    after: int = 3,
) -> tuple[set[str], list[dict]]:
    """What the workers print of their final states, and the journal; ``kill`` happens after ``after`` steps.

    METHOD is what ``elastic_worker.py`` says.
    """
    folder.mkdir()
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, HERE / "elastic_worker.py", "supervise", workers, folder, steps, method]
    until = time.monotonic() + PATIENCE

    def rows(name: str) -> list[dict]:
        file = folder / name
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    with open(folder / "output", "wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, stdout=output, stderr=output
        )
    try:
        if kill:
            while len(rows("steps-0.jsonl")) < after:
                assert process.poll() is None and time.monotonic() < until, (folder / "output").read_text()
                time.sleep(0.05)
        for row in rows("membership.jsonl"):
            if row["event"] == "started" and row["worker"] in kill:
                os.kill(row["pid"], 9)
        code = process.wait(until - time.monotonic())
    finally:
        process.kill()
        process.wait()
    text = "".join(file.read_text(errors="replace") for file in [folder / "output", *folder.glob("*.log")])
    assert code == 0, text[-4000:]
    finals = [line for line in text.splitlines() if line.startswith("HASH")]
    assert len(finals) == workers
    return set(finals), rows("membership.jsonl")
