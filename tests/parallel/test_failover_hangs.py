"""Which silent processes count as hung: by a clock that the tests move, and for real ones."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from parallel.failover.hangs import Hangs, processor_seconds
from parallel.failover.journal import Journal

HEARTBEAT, STALL = 10.0, 60.0
PID = 7

PROC = pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="no /proc on this machine")
# One call of the interpreter's own code: no other thread of Python runs until it ends.
BUSY = (
    "import threading, time\n"
    "def beat():\n"
    "    while True:\n"
    "        print('beat', flush=True); time.sleep(0.02)\n"
    "threading.Thread(target=beat, daemon=True).start()\n"
    "time.sleep(0.5); print('begins', flush=True); sum(range(10**12))\n"
)


def killed_after(used, hangs_at=STALL * 3, heard_at=100.0) -> tuple[float, str]:
    """Seconds of silence until the verdict, asked every 0.1 s, where ``used`` maps silence to processor seconds."""
    clock = [0.0]
    hangs = Hangs(HEARTBEAT, STALL, lambda pid: used(clock[0]))
    while clock[0] < hangs_at:
        clock[0] += 0.1
        if why := hangs.verdict(PID, heard_at, heard_at + clock[0]):
            return clock[0], why
    raise AssertionError("never killed")


def test_a_silent_worker_that_does_not_work_is_killed_after_the_short_bound():
    after, why = killed_after(lambda silent: 42.0)
    assert HEARTBEAT < after < HEARTBEAT + 1 and "no work for 10" in why


def test_threads_that_only_wait_are_no_work():
    after, _ = killed_after(lambda silent: 0.01 * silent)
    assert HEARTBEAT < after < HEARTBEAT + 1


@pytest.mark.parametrize("share", [0.1, 1.0, 8.0])
def test_a_silent_worker_at_work_is_killed_after_the_long_bound(share):
    after, why = killed_after(lambda silent: share * silent)
    assert STALL < after < STALL + 0.5 and "no sign of life for 60" in why and "work" not in why


def test_one_that_stops_working_is_killed_the_short_bound_later():
    after, why = killed_after(lambda silent: min(silent, 30.0))
    assert 30 + HEARTBEAT - 1 < after < 30 + HEARTBEAT + 1 and "no work" in why


def test_where_work_is_not_known_silence_decides_and_the_reason_says_so():
    after, why = killed_after(lambda silent: None)
    assert HEARTBEAT < after < HEARTBEAT + 1 and "not known" in why


def test_a_sign_of_life_begins_a_new_silence():
    hangs = Hangs(HEARTBEAT, STALL, lambda pid: 0.0)
    for now in range(0, 200, 2):
        # Heard 8 s ago at most: never long enough.
        assert hangs.verdict(PID, float(now - now % 10), float(now)) is None


def test_the_long_bound_is_not_below_the_short_one():
    hangs = Hangs(HEARTBEAT, 1.0, lambda pid: 0.0)
    assert hangs.verdict(PID, 0.0, HEARTBEAT - 1) is None


def test_processor_time_is_that_of_the_whole_session(tmp_path):
    def process(pid, session, times, name="a (b) c"):
        (tmp_path / str(pid)).mkdir()
        fields = ["S", "1", str(session), str(session), *["0"] * 7, *map(str, times), "20", "0"]
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")

    process(5, 5, (100, 20, 3, 4))
    process(6, 5, (1000, 0, 0, 0))
    process(8, 8, (9999, 0, 0, 0))
    (tmp_path / "self").mkdir()
    (tmp_path / "9").mkdir()
    ticks = os.sysconf("SC_CLK_TCK")
    assert processor_seconds(5, tmp_path) == pytest.approx(1127 / ticks)
    assert processor_seconds(4, tmp_path) is None
    assert processor_seconds(5, tmp_path / "absent") is None


@PROC
def test_a_process_that_keeps_its_interpreter_lives_and_a_stopped_one_does_not():
    # The bound leaves a full machine its time: 5 % of a processor count as work.
    hangs = Hangs(1.5, 600.0)
    child = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    try:
        assert child.stdout is not None
        heard_at = time.monotonic()
        for line in child.stdout:
            heard_at = time.monotonic()
            if line == "begins\n":
                break

        def verdict_within(seconds):
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(0.05)
                if why := hangs.verdict(child.pid, heard_at, time.monotonic()):
                    return why
            return None

        assert verdict_within(3.5) is None
        os.kill(child.pid, signal.SIGSTOP)
        assert "no work" in (verdict_within(4) or "")
    finally:
        child.kill()
        rest = child.communicate()[0]
    # It was silent indeed: a beat or two may have been on their way.
    assert rest.count("beat") <= 3


def test_the_journal_goes_on_and_tells(tmp_path):
    told = []
    for step in range(2):
        journal = Journal(tmp_path / "membership.jsonl", told.append)
        journal.write("lost", step=step, detection_s=0.12345)
        journal.close()
    assert [row["step"] for row in told] == [0, 1] and told[0]["detection_s"] == 0.123
    assert len((tmp_path / "membership.jsonl").read_text().splitlines()) == 2
