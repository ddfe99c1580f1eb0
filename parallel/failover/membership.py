"""A worker's side of the membership: its line to the supervisor, and the generations it goes through."""

import os
import socket
import threading
from collections.abc import Mapping
from typing import Any

from parallel.failover import world as worlds
from parallel.failover.channel import Lines
from parallel.failover.world import World

# What the supervisor leaves in a worker's environment.
SUPERVISOR, TOKEN, RESTARTS = "FAILOVER_SUPERVISOR", "FAILOVER_TOKEN", "FAILOVER_RESTARTS"
WORKER, WORKERS, BEAT = "FAILOVER_WORKER", "FAILOVER_WORKERS", "FAILOVER_BEAT"
# Exit code of a worker whose supervisor has gone.
ORPHAN = 75


class MembershipError(RuntimeError):
    """A worker was started by no supervisor, or by one that it cannot reach."""


class Member:
    """This process among the workers of a run.

    A thread tells the supervisor that the process lives, and how far it is; it ends the process at once when the
    supervisor has gone, whatever the main thread is waiting for.

    Attributes:
        worker: which of the workers this is, the same after a restart.
        workers: how many there are when all live.
        world: the generation that this process is in; None: in none.
    """

    def __init__(self, environment: Mapping[str, str] | None = None):
        """Report to the supervisor that started this process.

        Raises:
            MembershipError: there is none, or it does not answer.
        """
        given = os.environ if environment is None else environment
        missing = [name for name in (SUPERVISOR, TOKEN, WORKER, WORKERS, BEAT) if name not in given]
        if missing:
            raise MembershipError(
                f"{missing[0]} missing: a worker is started by a supervisor (jaxllm launch)"
            )
        self.worker, self.workers = int(given[WORKER]), int(given[WORKERS])
        host, _, port = given[SUPERVISOR].rpartition(":")
        try:
            connection = socket.create_connection((host, int(port)), timeout=30)
        except OSError as error:
            raise MembershipError(f"{SUPERVISOR}={given[SUPERVISOR]}: {error}") from error
        connection.settimeout(float(given[BEAT]))
        self._lines = Lines(connection)
        self._sending, self._news = threading.Lock(), threading.Condition()
        self.world: World | None = None
        self._published: World | None = None
        self._complete = self._asked_to_leave = self._dismissed = False
        self._together = False
        self._entered = -1
        self._send("hello", token=given[TOKEN], worker=self.worker, pid=os.getpid())
        threading.Thread(target=self._listen, name="membership", daemon=True).start()

    @property
    def generation(self) -> int:
        """Of the world that this process is in; 0: in none."""
        return 0 if self.world is None else self.world.generation

    @property
    def changing(self) -> bool:
        """The supervisor wants to form another world: come to :meth:`enter` at the end of this step.

        Members see this at different steps; agree on it (``parallel.distributed.agreed``) before leaving a sound world.
        """
        return self._asked_to_leave

    def enter(self, step: int | None) -> World:
        """Leave the world, if there is one, and join the next; returns once all its members have.

        Nothing that was made in the old world can be used afterwards (:func:`parallel.failover.world.leave`).

        Args:
            step: batches that the state of this process was trained on; None: it has no state.
        """
        while True:
            self.world, self._entered = None, -1
            # Devices that were asked for before there was a world are none of it.
            worlds.leave()
            with self._news:
                self._published, self._complete, self._asked_to_leave = None, False, False
                # Under the lock: what is published next is meant for this readiness.
                self._send("ready", step=step)
                self._news.wait_for(lambda: self._published is not None)
                world = self._published
            assert world is not None
            self.world = world
            worlds.connect(world, self.worker)
            with self._news:
                self._send("connected", generation=world.generation)
                self._news.wait_for(lambda: self._complete or self._asked_to_leave)
                if self._asked_to_leave:
                    continue
            try:
                worlds.meet()
            except RuntimeError as error:
                self.failed(error)
                continue
            self._send("met", generation=world.generation)
            if self._asked_to_leave:
                # Before the first step that is for a member that was lost, with another in its place.
                continue
            return world

    def together(self) -> bool:
        """Wait until all members of the world are here, or False at once when it has to change.

        The supervisor counts them, so that it does not matter how long somebody takes: before the first collective of a
        step, which has a bound, everybody must have compiled it.
        """
        with self._news:
            self._together = False
            self._send("here", generation=self.generation)
            self._news.wait_for(lambda: self._together or self._asked_to_leave)
            return not self._asked_to_leave

    def idle(self, step: int) -> None:
        """Wait in a world whose members cannot train until it has to change; :meth:`enter` comes next.

        Args:
            step: batches that this process was trained on.
        """
        # Newcomers are let into a world that has made a step: this one makes none.
        self.stepped(step)
        with self._news:
            self._news.wait_for(lambda: self._asked_to_leave)

    def stepping(self, step: int) -> None:
        """Note that the main thread begins step ``step``: one that does not while others do counts as hung."""
        self._entered = step

    def stepped(self, step: int) -> None:
        """Tell that ``step`` steps are done and committed; needed once in each generation, allowed after every step."""
        self._send("stepped", generation=self.generation, step=step)

    def failed(self, error: BaseException) -> None:
        """Tell that a step or a join raised; :meth:`enter` comes next."""
        self._send("failed", generation=self.generation, error=f"{type(error).__name__}: {error}"[:500])

    def finish(self) -> bool:
        """Tell that this worker is done; True: all are. False: a member was lost before it was, so :meth:`enter` again."""
        with self._news:
            self._send("finished", generation=self.generation)
            self._news.wait_for(lambda: self._dismissed or self._asked_to_leave)
            return self._dismissed

    def _send(self, kind: str, **content: Any) -> None:
        with self._sending:
            self._lines.send(kind=kind, **content)

    def _listen(self) -> None:
        while True:
            try:
                messages = self._lines.receive()
            except TimeoutError:
                messages = []
                self._send("beat", generation=self.generation, entered=self._entered)
            if messages is None:
                if self._dismissed:
                    return
                # The main thread may stand in a collective that nothing can end.
                os._exit(ORPHAN)
            with self._news:
                for message in messages:
                    self._hear(message)
                self._news.notify_all()

    def _hear(self, message: dict[str, Any]) -> None:
        if message["kind"] == "world":
            self._published = World(
                message["generation"], tuple(message["members"]), self.workers, message["address"]
            )
        elif message["kind"] == "complete":
            self._complete = True
        elif message["kind"] == "together":
            self._together = True
        elif message["kind"] == "leave":
            self._asked_to_leave = True
        elif message["kind"] == "bye":
            self._dismissed = True
