"""Worker processes: answers, errors, noise on stdout, silence and death."""

import os
import sys
from pathlib import Path

import pytest
from _protocol import Worker, WorkerError, peak_rss_mib

FOLDER = Path(__file__).parents[2] / "experiments" / "bench"
TOY = """
import importlib.util, os, sys, time
sys.path.insert(0, {folder!r})
from _protocol import serve

class Toy:
    def setup(self, threads):
        return len(os.sched_getaffinity(0))
    def double(self, x):
        print("a library talks")
        return 2 * x
    def fail(self):
        raise ValueError("seven is odd")
    def sleep(self, seconds):
        time.sleep(seconds)
    def die(self):
        os._exit(3)
    def sees(self, name):
        return importlib.util.find_spec(name) is not None

serve(Toy())
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY.format(folder=str(FOLDER)))
    worker = Worker([sys.executable, str(script)], dict(os.environ), tmp_path / "logs" / "toy.log")
    yield worker
    worker.close()


def test_answers_are_not_disturbed_by_what_libraries_print(worker):
    assert worker.call("double", 30, x=21) == 42
    assert worker.call("double", 30, x=[1]) == [1, 1]


def test_an_error_is_told_and_survived(worker):
    with pytest.raises(WorkerError, match="ValueError: seven is odd"):
        worker.call("fail", 30)
    assert worker.call("double", 30, x=1) == 2


def test_packages_are_not_looked_for_among_the_scripts(worker):
    # transformers would take kernels.py for the package of that name.
    assert (FOLDER / "_contest.py").is_file() and not worker.call("sees", 30, name="_contest")
    assert worker.call("sees", 30, name="json")


def test_setup_limits_the_cores(worker):
    assert worker.call("setup", 30, threads=1) == 1


def test_silence_ends_the_worker(worker):
    worker.call("double", 30, x=1)
    with pytest.raises(WorkerError, match=r"sleep: no answer within 0 s"):
        worker.call("sleep", 0.2, seconds=60)
    assert not worker.alive


def test_death_names_the_log(worker):
    with pytest.raises(WorkerError, match=r"died.*toy\.log"):
        worker.call("die", 30)
    with pytest.raises(WorkerError):
        worker.call("double", 30, x=1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_can_be_reset():
    block = bytearray(64 * 2**20)
    high = peak_rss_mib()
    del block
    assert 0 < peak_rss_mib(reset=True) <= high
