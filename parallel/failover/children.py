"""Processes that the supervisor starts: none of them outlives it, and the end of each is known at once."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

# prctl(2): the signal that a process gets when its parent ends, however that ends.
_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A worker's process, the leader of a process group of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: IO[Any] | None = None):
        """Start it.

        Args:
            command: and its arguments.
            environment: all of it.
            output: takes what it prints; None: this process's own.

        Raises:
            OSError: there is no such command.
        """
        # The supervisor has one thread, so that running code between fork and exec is safe.
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self.pid = self._process.pid
        # Readable when the process ends; elsewhere than on Linux the supervisor asks again and again.
        self.descriptor = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else None

    def ended(self) -> int | None:
        """Its exit code, negative for a signal; None: it runs. Once it is known the process group is killed too."""
        code = self._process.poll()
        if code is not None and self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
            self._signal_group(signal.SIGKILL)
        return code

    def signal(self, number: int) -> None:
        """Send a signal to the process and to those that it has started."""
        if self._process.poll() is None:
            self._signal_group(number)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def kill(self) -> int:
        """End it, stopped or not, and wait until it has ended."""
        self.signal(signal.SIGKILL)
        return self._process.wait()


class Service:
    """A coordination service in a process of its own (:mod:`parallel.failover.coordinator`), first a spare one.

    Attributes:
        members: of the world that it was given; None: it is spare.
        address: where it listens, or will.
        ready: it listens.
        broken: it has ended, or could not listen.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "parallel.failover.coordinator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self.members: tuple[int, ...] | None = None
        self.address = ""
        self.ready = self.broken = False

    def fileno(self) -> int:
        """For selectors."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def serve(self, members: tuple[int, ...], host: str, heartbeat: int) -> None:
        """Let it listen for these members."""
        self.members, self.address = members, f"{host}:{free_port(host)}"
        self._begin("serve", heartbeat)

    def stand_in(self, service: "Service", rank: int, heartbeat: int) -> None:
        """Let it come to a service in the place of a member that has died on its way into the world."""
        self.members, self.address = service.members, service.address
        self._begin("stand", heartbeat, rank)

    def _begin(self, task: str, heartbeat: int, *more: int) -> None:
        assert self._process.stdin is not None and self.members is not None
        words = (task, self.address, len(self.members), heartbeat, *more)
        try:
            self._process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self.broken = True

    def hear(self) -> None:
        """Read what it says."""
        said = os.read(self.fileno(), 1 << 12)
        self.ready |= b"ready" in said
        self.broken |= not said or b"failed" in said

    def end(self) -> None:
        """End it, and wait until it has ended."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()


def free_port(host: str) -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
