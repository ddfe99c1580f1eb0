"""Workers that die, hang and come back, as real processes on loopback; parameters must be those of an undisturbed run.

The kills come by signals from here; what is known of the workers is read from the files of the run.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from parallel.failover.membership import Member, MembershipError
from parallel.failover.world import TIMEOUT_FLAG, with_timeout
from tests.parallel.failover_worker import undisturbed

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
# Of anything that is waited for; a loaded machine takes its time.
PATIENCE = 240


def _loopback() -> bool:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError:
        return False
    return hasattr(os, "fork")


pytestmark = pytest.mark.skipif(not _loopback(), reason="no sockets on loopback, or no fork, on this machine")


def _runs(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Run:
    """A supervised run of :mod:`tests.parallel.failover_worker`."""

    def __init__(self, folder: pathlib.Path, workers: int, steps: int, pause: float = 0.1, **options):
        self.folder, self.workers, self.steps = folder, workers, steps
        folder.mkdir(exist_ok=True)
        words = [f"{name}={value}" for name, value in options.items()]
        command = [sys.executable, HERE / "failover_worker.py", "supervise", workers, folder, steps, pause]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
        }
        self.output = open(folder / "output", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*map(str, command), *words],
            env=environment,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.output.close()
        try:
            self.wait(lambda: not self.living(), "no worker outlives its supervisor")
        finally:
            for pid in self.living():
                os.kill(pid, signal.SIGKILL)

    def _rows(self, name: str) -> list[dict]:
        file = self.folder / name
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def journal(self, event: str) -> list[dict]:
        return [row for row in self._rows("membership.jsonl") if row["event"] == event]

    def lines(self, worker: int) -> list[dict]:
        return self._rows(f"steps-{worker}.jsonl")

    def pids(self, worker: int) -> list[int]:
        return [row["pid"] for row in self.journal("started") if row["worker"] == worker]

    def living(self) -> list[int]:
        """Processes that the run has started and that still run; the services are children of the supervisor."""
        return [pid for worker in range(self.workers) for pid in self.pids(worker) if _runs(pid)]

    def step(self, worker: int) -> int:
        return max((row.get("step", 0) for row in self.lines(worker)), default=0)

    def wait(self, condition, what: str) -> None:
        until = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < until, f"not within {PATIENCE} s: {what}\n{self.told()}"
            time.sleep(0.02)

    def told(self) -> str:
        texts = [file.read_text(errors="replace")[-3000:] for file in sorted(self.folder.iterdir())]
        return "\n".join(texts)

    def wait_step(self, step: int, worker: int = 0) -> None:
        self.wait(lambda: self.step(worker) >= step, f"worker {worker} at step {step}")

    def send(self, worker: int, number: int = signal.SIGKILL) -> int:
        pid = self.pids(worker)[-1]
        os.kill(pid, number)
        return pid

    def wait_recovered(self, count: int) -> None:
        """Until ``count`` changes after the first world have led to a step."""
        self.wait(lambda: len(self.journal("recovered")) > count, f"{count} recoveries")

    def finish(self, members: int | None = None) -> None:
        """Wait for the end, and check everything that holds for every run."""
        assert self.process.wait(PATIENCE) == 0, self.told()
        expected = undisturbed(self.steps)
        seen = set()
        for worker in range(self.workers):
            for row in self.lines(worker):
                if "step" in row:
                    assert row["crc"] == expected[row["step"] - 1], (worker, row)
                    seen.add(row["step"])
        assert seen == set(range(1, self.steps + 1))
        text = "".join(
            file.read_text(errors="replace")
            for file in self.folder.iterdir()
            if file.name == "output" or file.suffix == ".log"
        )
        finals = [line.split()[2:4] for line in text.splitlines() if line.startswith("CHECKSUM")]
        assert finals == [[str(self.steps), str(expected[-1])]] * (
            self.workers if members is None else members
        )
        jobs: dict[tuple[int, int], list[int]] = {}
        for worker in range(self.workers):
            for row in self.lines(worker):
                if "step" in row:
                    jobs.setdefault((row["generation"], row["step"]), []).extend(row["jobs"])
        # No sample twice in a step, and none lost where every member lived to write of it.
        assert all(len(set(shards)) == len(shards) for shards in jobs.values())


def test_a_killed_worker_is_replaced_while_the_others_go_on(tmp_path):
    with Run(tmp_path, 2, 40) as run:
        run.wait_step(3)
        killed = run.send(1)
        run.wait(lambda: len(run.journal("recovered")) == 3, "worker 1 to be back")
        run.finish()
        assert len(run.pids(0)) == 1 and len(run.pids(1)) == 2
        (lost,) = run.journal("lost")
        assert lost["worker"] == 1 and lost["pid"] == killed and lost["why"] == "killed by SIGKILL"
        # The survivor trained on alone before the other one was back, and gave it its state.
        alone = [row for row in run.lines(0) if row.get("members") == [0]]
        (carried,) = [row for row in run.lines(1) if row.get("carried", 0)]
        assert alone and carried["carried"] >= alone[-1]["step"] and carried["source"] == 0
        worlds = [row["members"] for row in run.journal("world")]
        assert worlds == [[0, 1], [0], [0, 1]]
        first, shrunk, grown = run.journal("recovered")
        assert shrunk["why"][0]["worker"] == 1 and shrunk["recovery_s"] > 0 and shrunk["step"] > first["step"]
        assert grown["step"] > shrunk["step"]


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param(each, marks=pytest.mark.slow if each == (0, 3) else pytest.mark.nightly)
        for each in ((0,), (2,), (0, 3), (1, 2, 3))
    ],
    ids=str,
)
def test_any_workers_may_be_killed_at_once(workers, tmp_path):
    with Run(tmp_path, 4, 60, timeout=20) as run:
        run.wait_step(3, worker=2)
        for worker in workers:
            run.send(worker)
        run.wait(
            lambda: (
                run.journal("recovered")[-1:]
                and run.journal("recovered")[-1]["members"] == [0, 1, 2, 3]
                and len(run.journal("lost")) == len(workers)
            ),
            "all to be back",
        )
        run.finish()
        for worker in range(4):
            assert len(run.pids(worker)) == 1 + (worker in workers)


@pytest.mark.parametrize(
    "moment",
    [pytest.param("lost", marks=pytest.mark.slow), pytest.param("world", marks=pytest.mark.nightly)],
)
def test_a_second_worker_may_be_killed_during_recovery(moment, tmp_path):
    with Run(tmp_path, 4, 60, timeout=20) as run:
        run.wait_step(3)
        worlds = len(run.journal("world"))
        run.send(1)
        count = {
            "lost": lambda: len(run.journal("lost")) == 1,
            "world": lambda: len(run.journal("world")) > worlds,
        }
        run.wait(count[moment], moment)
        run.send(0)
        run.finish()
        assert [len(run.pids(worker)) for worker in range(4)] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("place", "worker"),
    [
        pytest.param("connect", 0, marks=pytest.mark.nightly),
        pytest.param("connect", 2, marks=pytest.mark.nightly),
        pytest.param("meet", 0, marks=pytest.mark.slow),
        pytest.param("meet", 2, marks=pytest.mark.nightly),
    ],
)
def test_a_member_may_die_on_its_way_into_a_world(place, worker, tmp_path):
    """The others could not leave the service that it has not come to, or would wait a minute for its devices."""
    with Run(tmp_path, 3, 50, die=f"{place}:{worker}:2", timeout=20) as run:
        run.wait_step(3)
        run.send(1)
        run.wait(lambda: len(run.journal("lost")) == 2, "the second loss")
        run.finish()
        expected = [1, 2, 1]
        expected[worker] = 2
        assert [len(run.pids(worker)) for worker in range(3)] == expected
        waits = [row["recovery_s"] for row in run.journal("recovered")]
        assert max(waits) < 45 and not any("topology" in row["error"] for row in run.journal("failed"))


@pytest.mark.slow
def test_a_hung_worker_is_killed_and_replaced(tmp_path):
    with Run(tmp_path, 3, 60, heartbeat=6, timeout=20) as run:
        run.wait_step(3)
        begin = time.monotonic()
        stopped = run.send(2, signal.SIGSTOP)
        run.wait(lambda: run.journal("lost"), "the hang to be noticed")
        noticed = time.monotonic() - begin
        (lost,) = run.journal("lost")
        assert lost["pid"] == stopped and "no sign of life" in lost["why"]
        assert 6 <= lost["detection_s"] < 12 and noticed < 30
        # Killed before its place was given away.
        assert not _runs(stopped)
        run.finish()
        assert [len(run.pids(worker)) for worker in range(3)] == [1, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_supervisor_leaves_nobody(stopped, tmp_path):
    with Run(tmp_path, 3, 1000) as run:
        run.wait_step(2)
        if stopped:
            run.send(1, signal.SIGSTOP)
        children = pathlib.Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")
        mine = [int(pid) for pid in children.read_text().split()]
        # Three workers, the service, and the spare one.
        assert len(mine) == 5 and set(run.living()) < set(mine)
        run.process.kill()
        run.process.wait()
        run.wait(lambda: not any(map(_runs, mine)), "no orphans")


@pytest.mark.slow
def test_the_run_ends_with_those_who_are_left(tmp_path):
    with Run(tmp_path, 3, 25, restarts=0) as run:
        run.wait_step(3)
        run.send(0)
        run.finish(members=2)
        assert run.journal("world")[-1]["members"] == [1, 2]


def test_a_worker_without_a_supervisor_is_refused():
    with pytest.raises(MembershipError, match=r"FAILOVER_SUPERVISOR missing: .*jaxllm launch"):
        Member({})


def test_the_bound_of_collectives_that_is_given_stays():
    assert with_timeout("", 9) == f"{TIMEOUT_FLAG}=9"
    assert with_timeout("--xla_x=1", 9) == f"--xla_x=1 {TIMEOUT_FLAG}=9"
    assert with_timeout(f"{TIMEOUT_FLAG}=5", 9) == f"{TIMEOUT_FLAG}=5"
