"""Workers behind pipes: one JSON object per line each way, so that libraries never share a process.

The worker side imports nothing but the standard library before the first request says how many threads there are: both XLA
and OpenMP size their pools when they load.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """A worker answered with an error, died, or took too long."""


def peak_rss_mib(reset: bool = False) -> float:
    """Highest resident size of this process in MiB since the last reset; 0 where /proc does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    # Not getrusage: its maximum survives exec, so a worker would inherit that of the driver.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def serve(worker: Any) -> None:
    """Answer requests from stdin until ``exit`` or its end; ``{"op": name, ...}`` calls ``worker.name(...)``."""
    # Whoever looks for a package called "kernels", as transformers does, must not find the script beside this file.
    here = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != here]
    # Libraries print to stdout; answers go to a private copy of it and everything else to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        if op == "exit":
            return
        try:
            if "threads" in request:
                limit_threads(request["threads"])
            answer = {"ok": True, "result": getattr(worker, op)(**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}".strip()[:600]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def limit_threads(threads: int) -> None:
    """Keep to the first ``threads`` cores: XLA has no other switch, and the same cores for all is the point."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def environment(threads: int, cache: Path) -> dict[str, str]:
    """Variables of a worker: thread counts, no spinning, CPU only, compilation caches inside the run folder."""
    count = str(threads)
    quiet = {
        # A spinning OpenMP thread of an idle contender would take the core of the one that is measured.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    sizes = {name: count for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    # What `jaxllm` sets for itself (jaxllm/cli/environment.py), here for every contender alike.
    memory = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "MALLOC_TOP_PAD_": str(2**28),
    }
    caches = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        # Its pool of compile processes would idle beside the measurement.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    return {**os.environ, **quiet, **sizes, **memory, **caches}


class Worker:
    """The driver's end of one worker process."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._log = log.open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=env, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def call(self, op: str, timeout: float, **arguments: Any) -> Any:
        """The result of one request.

        Raises:
            WorkerError: with the worker's own message; after a timeout or a death the worker is closed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise WorkerError(f"{op}: no answer within {timeout:.0f} s") from None
        except (OSError, ValueError):
            # A pipe that broke, or was closed after an earlier failure.
            line = None
        if line is None:
            self.close()
            raise WorkerError(f"{op}: the worker died; its last words are in {self.log.name}")
        answer = json.loads(line)
        if not answer["ok"]:
            raise WorkerError(answer["error"])
        return answer["result"]

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            try:
                if stream is not None:
                    stream.close()
            except OSError:
                pass
