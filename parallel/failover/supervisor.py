"""Keeps the workers of a run on one host: starts them, notices who dies or hangs, and forms the next world of the living.

It imports no JAX and has one thread. A change goes: somebody is lost, or a restarted worker stands ready; the living are
asked to leave their world and come to the gate with the step of their state; when all are there, a fresh coordination
service is given its address, and the new generation is published to each of them in one message.
"""

import os
import secrets
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.failover import membership
from parallel.failover.channel import Lines
from parallel.failover.children import Child, Service
from parallel.failover.hangs import Hangs
from parallel.failover.journal import Journal
from parallel.failover.roster import Roster, Worker
from parallel.failover.world import with_timeout

# Exit code of a command line that cannot be run: starting it again would not help.
USAGE = 2
# Seconds that worker 0 has for its error message, once another worker has ended with that code.
LAST_WORD = 20.0


@dataclass(frozen=True)
class SupervisorOptions:
    """How to keep the workers.

    Attributes:
        workers: n.
        max_restarts: of each worker; after that its place stays empty.
        heartbeat: seconds without a sign of life and without work after which a process counts as hung and is killed.
        stall: seconds that a member may be silent at work, behind the others, or late at the gate, before it counts as
            hung.
        collective_timeout: seconds that a collective may take on CPUs; must exceed what compiling differs by.
        backoff: seconds before a restart; doubles with each, up to 30.
        host: address to listen on.
    """

    workers: int
    max_restarts: int = 10
    heartbeat: float = 10.0
    stall: float = 180.0
    collective_timeout: int = 60
    backoff: float = 0.5
    host: str = "127.0.0.1"


class Supervisor:
    """See :func:`supervise`."""

    def __init__(
        self,
        command: Sequence[str],
        options: SupervisorOptions,
        environment: Mapping[str, str],
        journal: Journal,
        logs: Path | None = None,
    ):
        self.command, self.options, self.environment = list(command), options, dict(environment)
        self.journal, self.logs = journal, logs
        self.roster = Roster.of(options.workers)
        self.token = secrets.token_hex(16)
        self.selector = selectors.DefaultSelector()
        self.children: dict[int, Child] = {}
        self.lines: dict[int, Lines] = {}
        self.start_at = dict.fromkeys(range(options.workers), 0.0)
        self.codes: dict[int, int] = {}
        self.spare: Service | None = None
        self.service: Service | None = None
        self.serving: Service | None = None
        self.stand_ins: list[Service] = []
        self.absent: list[int] = []
        self.signals = 0
        self.dismissed = False
        self.fatal: int | None = None
        self.fatal_until = 0.0
        self.hangs = Hangs(options.heartbeat, options.stall)
        self.hung: dict[int, str] = {}
        self._began: float | None = None
        self._why: list[dict[str, Any]] = []
        self._recovering = False
        self._completed = False

    def run(self) -> int:
        """Until every worker is done; see :func:`supervise`."""
        with ExitStack() as stack:
            stack.callback(self._end_all)
            listener = stack.enter_context(socket.create_server((self.options.host, 0)))
            self.address = "{}:{}".format(*listener.getsockname()[:2])
            self.selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
            self._catch_signals(stack)
            looked = time.monotonic()
            while not self._all_ended() and not self._refused():
                self._start_due()
                for key, _ in self.selector.select(0.1):
                    key.data()
                now = time.monotonic()
                # Whoever slept itself must not blame the others: first hear what they have said meanwhile.
                if now - looked < min(1.0, self.options.heartbeat / 2):
                    self._look_for_hangs(now)
                else:
                    for worker in self.roster.workers:
                        worker.heard_at = max(worker.heard_at, now)
                looked = now
                for index in list(self.children):
                    self._reap(index)
                self._settle()
        if self.fatal is not None:
            return self.fatal
        if not self.dismissed:
            return 130 if self.signals else 1
        return max((abs(code) for code in self.codes.values()), default=0)

    # Processes

    def _start_due(self) -> None:
        if self.spare is None:
            self.spare = service = Service()
            self.selector.register(service, selectors.EVENT_READ, lambda: self._hear_service(service))
        if self.roster.over or self.signals or self.fatal is not None:
            return
        for worker in self.roster.at("down"):
            if time.monotonic() >= self.start_at[worker.index]:
                self._start(worker)

    def _start(self, worker: Worker) -> None:
        own = {
            membership.SUPERVISOR: self.address,
            membership.TOKEN: self.token,
            membership.WORKER: str(worker.index),
            membership.WORKERS: str(self.options.workers),
            membership.RESTARTS: str(worker.restarts),
            membership.BEAT: str(self.options.heartbeat / 10),
            "XLA_FLAGS": with_timeout(self.environment.get("XLA_FLAGS", ""), self.options.collective_timeout),
        }
        index = worker.index
        if self.logs is None or index == 0:
            child = Child(self.command, self.environment | own)
        else:
            with open(self.logs / f"worker-{index}.log", "ab") as output:
                child = Child(self.command, self.environment | own, output)
        self.children[index] = child
        restarts = worker.restarts
        self.roster.workers[index] = Worker(
            index, "starting", told=0, heard_at=time.monotonic(), restarts=restarts
        )
        if child.descriptor is not None:
            self.selector.register(child.descriptor, selectors.EVENT_READ, lambda: self._reap(index))
        self.journal.write("started", worker=index, pid=child.pid, restarts=restarts)

    def _reap(self, index: int) -> None:
        child = self.children.get(index)
        if child is None:
            return
        descriptor = child.descriptor
        code = child.ended()
        if code is None:
            return
        if descriptor is not None:
            self.selector.unregister(descriptor)
        del self.children[index]
        self.hangs.forget(child.pid)
        if (lines := self.lines.pop(index, None)) is not None:
            self.selector.unregister(lines)
            lines.close()
        worker, now = self.roster.workers[index], time.monotonic()
        was, worker.place = worker.place, "gone"
        if was == "done":
            self.codes[index] = code
        if self.dismissed or self.signals or was == "done":
            inside = was == "inside"
        else:
            # One that refuses its arguments before anybody has made a step would do so again.
            refused = code == USAGE and not any(other.step for other in self.roster.workers)
            if refused or (code == 0 and self.roster.generation == 0):
                self.fatal, self.fatal_until = USAGE, now + LAST_WORD
                if code == 0:
                    self.journal.write("refused", worker=index, why="it ended without joining the run")
                return
            inside = was in ("inside", "waiting") and worker.generation > 0
            if worker.restarts < self.options.max_restarts:
                worker.place = "down"
                self.start_at[index] = now + min(30.0, self.options.backoff * 2**worker.restarts)
                worker.restarts += 1
        if self.dismissed:
            return
        row = {
            "worker": index,
            "pid": child.pid,
            "why": self.hung.pop(index, None) or _named(code),
            "detection_s": now - worker.heard_at,
            "generation": worker.generation,
            "step": worker.step,
        }
        self.journal.write("lost", **row)
        if inside:
            if was == "inside":
                self.roster.lost.append(index)
                if worker.met < self.roster.generation:
                    # The others wait for it at the service, or for its devices, and cannot leave.
                    self.absent.append(self.roster.members.index(index))
            self._begin_change({name: row[name] for name in ("worker", "why", "detection_s")}, now)

    def _begin_change(self, why: dict[str, Any] | None, now: float) -> None:
        self._began = now if self._began is None else self._began
        self._why += [] if why is None else [why]

    def _look_for_hangs(self, now: float) -> None:
        for worker in self.roster.at("waiting", "inside", "done"):
            child = self.children.get(worker.index)
            if child is not None and (why := self.hangs.verdict(child.pid, worker.heard_at, now)):
                self._kill(worker, why)
        for worker in self.roster.at("starting"):
            if now - worker.heard_at > self.options.stall:
                self._kill(worker, f"hung: no sign of life since its start {self.options.stall:g} s ago")
        for worker in self.roster.behind(now, self.options.stall):
            self._kill(worker, f"hung: has not begun a step that others began {self.options.stall:g} s ago")

    def _kill(self, worker: Worker, why: str) -> None:
        """End a hung process before its place is given away."""
        if (child := self.children.get(worker.index)) is not None:
            self.hung[worker.index] = why
            child.kill()
            self._reap(worker.index)

    # What is heard

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.settimeout(5)
        lines = Lines(connection)
        self.selector.register(lines, selectors.EVENT_READ, lambda: self._greet(lines))

    def _greet(self, lines: Lines) -> None:
        self.selector.unregister(lines)
        with suppress(TimeoutError):
            first, *more = lines.receive() or [{}]
            index = first.get("worker")
            if first.get("token") == self.token and index in self.children and index not in self.lines:
                self.lines[index] = lines
                self.selector.register(lines, selectors.EVENT_READ, lambda: self._hear(index))
                self._heed(index, more)
                return
        lines.close()

    def _hear(self, index: int) -> None:
        lines = self.lines.get(index)
        if lines is None:
            return
        with suppress(TimeoutError):
            messages = lines.receive()
            if messages is None:
                # It closed the line: it has ended, or will not be heard any more.
                self.selector.unregister(lines)
                del self.lines[index]
                lines.close()
            else:
                self._heed(index, messages)

    def _heed(self, index: int, messages: list[dict[str, Any]]) -> None:
        worker, now = self.roster.workers[index], time.monotonic()
        for message in messages:
            worker.heard_at = now
            kind = message["kind"]
            if kind == "ready":
                worker.place, worker.step = "waiting", message["step"]
            elif kind == "beat":
                entered = (message["generation"], message["entered"])
                # Between worlds it is in none.
                if entered > worker.entered:
                    worker.entered, worker.entered_at = entered, now
            elif kind == "connected":
                worker.connected = message["generation"]
            elif kind == "met":
                worker.met = message["generation"]
            elif kind == "here":
                worker.here = message["generation"]
            elif kind == "stepped":
                worker.stepped, worker.step = message["generation"], message["step"]
            elif kind == "failed":
                worker.failed = message["generation"]
                self.journal.write(
                    "failed", **{name: message[name] for name in ("generation", "error")}, worker=index
                )
                self._begin_change(None, now)
            elif kind == "finished":
                worker.place = "done"

    def _hear_service(self, service: Service) -> None:
        service.hear()
        if service.broken:
            self._end_service(service)

    def _end_service(self, service: Service) -> None:
        self.selector.unregister(service)
        service.end()
        self.spare = None if service is self.spare else self.spare
        self.service = None if service is self.service else self.service
        if service is self.serving:
            self.serving = None
        if service in self.stand_ins:
            self.stand_ins.remove(service)

    # Worlds

    def _settle(self) -> None:
        roster, now = self.roster, time.monotonic()
        if self._recovering and roster.settled and roster.generation and roster.at("inside", "done"):
            self._recovering = False
            steps = [worker.step for worker in roster.at("inside", "done") if worker.step is not None]
            self.journal.write(
                "recovered",
                generation=roster.generation,
                members=list(roster.members),
                why=self._why,
                recovery_s=0.0 if self._began is None else now - self._began,
                step=min(steps, default=None),
            )
            self._began, self._why = None, []
        for worker in roster.to_tell():
            if self._began is None:
                waiting = ", ".join(str(each.index) for each in roster.at("waiting"))
                self._begin_change({"why": f"ready: {waiting}"}, now)
            worker.told, worker.told_at = worker.generation, now
            self._say(worker, kind="leave")
        if self.absent and self.serving is not None and self.spare is not None:
            stand_in, self.spare = self.spare, None
            self.stand_ins.append(stand_in)
            stand_in.stand_in(self.serving, self.absent.pop(), heartbeat=100)
        if roster.complete and not self._completed:
            self._completed = True
            for worker in roster.at("inside"):
                self._say(worker, kind="complete")
        if roster.together:
            for worker in roster.at("inside"):
                worker.here = 0
                self._say(worker, kind="together")
        self._form()
        if roster.finished and not self.dismissed:
            self.dismissed = True
            for worker in roster.workers:
                if worker.place == "done":
                    self._say(worker, kind="bye")
                elif worker.index in self.children:
                    self.children[worker.index].kill()

    def _form(self) -> None:
        members = self.roster.next_members()
        if self.service is not None and self.service.members != members:
            self._end_service(self.service)
        if members is None:
            return
        if self.service is None:
            if self.spare is not None:
                self.service, self.spare = self.spare, None
                self.service.serve(members, self.options.host, heartbeat=100)
            return
        if self.service.ready:
            self._publish(members, self.service)

    def _publish(self, members: tuple[int, ...], service: Service) -> None:
        roster = self.roster
        for old in (self.serving, *self.stand_ins):
            # All clients have come to the gate, so they have left it.
            if old is not None:
                self._end_service(old)
        self.absent.clear()
        self._completed = False
        self.serving, self.service = service, None
        before, roster.members = roster.members, members
        roster.generation += 1
        roster.lost.clear()
        newcomers = [
            index for index in members if index not in before or roster.workers[index].generation == 0
        ]
        for index in members:
            worker = roster.workers[index]
            worker.place, worker.generation = "inside", roster.generation
            self._say(
                worker,
                kind="world",
                generation=roster.generation,
                members=members,
                address=service.address,
            )
        self._recovering = True
        self.journal.write(
            "world",
            generation=roster.generation,
            members=list(members),
            newcomers=newcomers,
            steps={str(index): roster.workers[index].step for index in members},
        )

    def _say(self, worker: Worker, **message: Any) -> None:
        if (lines := self.lines.get(worker.index)) is not None:
            lines.send(**message)

    # The end

    def _catch_signals(self, stack: ExitStack) -> None:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        for end in (ours, theirs):
            end.setblocking(False)
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs.fileno()))
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, self._stop))
        self.selector.register(ours, selectors.EVENT_READ, lambda: ours.recv(64))

    def _stop(self, number: int, frame: Any) -> None:
        """The first signal goes to the workers, which save and end; the second ends everything."""
        self.signals += 1
        for index, child in self.children.items():
            known = self.roster.workers[index].place not in ("starting", "down")
            child.signal(signal.SIGTERM if known and self.signals == 1 else signal.SIGKILL)

    def _refused(self) -> bool:
        """The command cannot be run; worker 0, whose output is seen, has some time to say so itself."""
        return self.fatal is not None and (0 not in self.children or time.monotonic() > self.fatal_until)

    def _all_ended(self) -> bool:
        pending = self.roster.at("down") if not (self.signals or self.roster.over) else []
        return not self.children and not pending

    def _end_all(self) -> None:
        for child in self.children.values():
            child.kill()
        for service in (self.spare, self.service, self.serving, *self.stand_ins):
            if service is not None:
                service.end()
        self.selector.close()


def _named(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def supervise(
    command: Sequence[str],
    options: SupervisorOptions,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    tell: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Run a command as several workers until all are done.

    Args:
        command: of a worker; it uses :class:`parallel.failover.membership.Member`.
        options: how to keep them.
        folder: takes ``membership.jsonl`` and what workers other than 0 print; None: nothing is written.
        environment: of the workers; None: this process's.
        tell: called with every line of the journal.

    Returns:
        the largest exit code of the workers; 2: the command cannot be run; 1: every worker has been given up;
        130: stopped by a signal.

    Raises:
        OSError: the command or the address cannot be used.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(None if folder is None else folder / "membership.jsonl", tell)
    try:
        given = os.environ if environment is None else environment
        return Supervisor(command, options, given, journal, folder).run()
    finally:
        journal.close()
