"""Which silent workers hang: those that do not work either.

Signs of life come from a thread of Python, which a long call that keeps the interpreter to itself holds up: such a worker
is silent and sound. One that is stopped, or waits for itself, uses no processor time.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Share of one processor from which on a process works: threads that only wait use less, compiling on a full machine more.
WORKING = 0.05


def processor_seconds(leader: int, proc: Path = Path("/proc")) -> float | None:
    """Processor time, user and system, of all threads of a session's processes and of their children that have ended.

    Args:
        leader: process id of the session's leader.
        proc: where proc(5) is mounted.

    Returns:
        seconds, in steps of a clock tick; None: this system does not tell.
    """
    ticks = None
    try:
        names = [name for name in os.listdir(proc) if name.isdecimal()]
    except OSError:
        return None
    for name in names:
        try:
            text = (proc / name / "stat").read_text()
        except OSError:
            continue  # It has ended meanwhile, or is not ours.
        # The name in brackets may hold anything; the state, field 3, follows it.
        fields = text[text.rindex(")") + 1 :].split()
        if int(fields[3]) == leader:
            ticks = (ticks or 0) + sum(map(int, fields[11:15]))
    return None if ticks is None else ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class _Silence:
    """Since when a worker is silent, and the processor time it had used when it was last seen to work; all in seconds."""

    heard_at: float
    worked_at: float
    used: float
    looked_at: float


class Hangs:
    """Tells which processes hang, by their silence and their work."""

    def __init__(
        self,
        heartbeat: float,
        stall: float,
        used: Callable[[int], float | None] = processor_seconds,
    ):
        """Watch nobody yet.

        Args:
            heartbeat: seconds that a process may be silent and use next to no processor time.
            stall: seconds that it may be silent at work; where less than ``heartbeat``, that.
            used: processor seconds of a process id and its children; None: unknown, so that silence alone decides.
        """
        self.heartbeat, self.stall, self._used = heartbeat, max(heartbeat, stall), used
        self._silent: dict[int, _Silence] = {}

    def verdict(self, pid: int, heard_at: float, now: float) -> str | None:
        """Why a process counts as hung at ``now``, or None; to be asked several times within ``heartbeat`` seconds.

        Args:
            pid: the process, leader of its session.
            heard_at: when it gave its last sign of life, by the clock of ``now``.
            now: seconds by a clock that only moves on.
        """
        silent = now - heard_at
        if silent <= self.heartbeat / 4:
            return None
        if silent > self.stall:
            return f"hung: no sign of life for {silent:.1f} s"
        known = self._silent.get(pid)
        if known is not None and known.heard_at == heard_at and now - known.looked_at < self.heartbeat / 20:
            return None
        used = self._used(pid)
        if used is None:
            return _blind(silent) if silent > self.heartbeat else None
        if known is None or known.heard_at != heard_at:
            # What it did until now is unknown: its silence counts from the start, unless it works from here on.
            self._silent[pid] = _Silence(heard_at, heard_at, used, now)
            return None
        known.looked_at = now
        if used - known.used >= WORKING * self.heartbeat:
            known.worked_at, known.used = now, used
        if now - known.worked_at > self.heartbeat:
            return f"hung: no sign of life for {silent:.1f} s, and no work for {now - known.worked_at:.1f} s"
        return None

    def forget(self, pid: int) -> None:
        """A process has ended."""
        self._silent.pop(pid, None)


def _blind(silent: float) -> str:
    return f"hung: no sign of life for {silent:.1f} s (whether it works is not known here)"
