"""What the supervisor knows of its workers, and who may form the next world: no sockets, no processes."""

from dataclasses import dataclass, field
from typing import Literal

# starting: its process runs and has not reported; waiting: it stands ready for the next world; inside: it was given a
# world; done: it says that its part is over; down: it has no process; gone: it will not be started again.
Place = Literal["starting", "waiting", "inside", "done", "down", "gone"]


@dataclass
class Worker:
    """One worker.

    Attributes:
        index: which.
        place: see :data:`Place`.
        generation: newest world that it was given.
        connected: newest world to whose service it has come.
        met: newest world in which it has learnt of all devices.
        step: batches that its state was trained on, as far as it told; None: it has no state.
        entered: newest step that its main thread has begun.
        entered_at: when that was first heard of.
        heard_at: last sign of life.
        told: newest generation that it was asked to leave.
        told_at: when.
        failed: newest generation in which it said that a step failed.
        stepped: newest generation in which it has made a step.
        here: the newest world if it waits there for all members to come to the same place.
        restarts: so far.
    """

    index: int
    place: Place = "down"
    generation: int = 0
    connected: int = 0
    met: int = 0
    step: int | None = None
    entered: tuple[int, int] = (0, -1)
    entered_at: float = 0.0
    heard_at: float = 0.0
    told: int = 0
    told_at: float = 0.0
    failed: int = 0
    stepped: int = 0
    here: int = 0
    restarts: int = 0


@dataclass
class Roster:
    """All workers, and the newest world.

    Attributes:
        workers: by index.
        generation: newest one published; 0: none.
        members: of it.
        lost: members of it that have died since.
    """

    workers: list[Worker]
    generation: int = 0
    members: tuple[int, ...] = ()
    lost: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, count: int) -> "Roster":
        """That many workers, none of them started."""
        return cls([Worker(index) for index in range(count)])

    def at(self, *places: Place) -> list[Worker]:
        """Workers that are there."""
        return [worker for worker in self.workers if worker.place in places]

    @property
    def complete(self) -> bool:
        """Every member of the newest world has come to its service, and lives."""
        inside = self.at("inside", "done")
        return bool(inside) and not self.lost and all(each.connected >= self.generation for each in inside)

    @property
    def together(self) -> bool:
        """Every member of the newest world waits for the others."""
        inside = self.at("inside")
        return bool(inside) and not self.lost and all(each.here == self.generation for each in inside)

    @property
    def settled(self) -> bool:
        """All living members of the newest world have made a step in it."""
        return all(
            worker.stepped >= self.generation or worker.place == "done"
            for worker in self.at("inside", "done")
        )

    @property
    def to_change(self) -> bool:
        """The newest world must end: a member was lost or has failed, or, between steps, a newcomer stands ready."""
        inside = self.at("inside", "done")
        broken = bool(self.lost) or any(worker.failed >= self.generation for worker in self.workers)
        returned = any(worker.index in self.members for worker in self.at("waiting"))
        newcomers = bool(self.at("waiting")) and self.settled and not self.over
        return bool(inside) and (broken or returned or newcomers)

    def to_tell(self) -> list[Worker]:
        """Those inside who have to be told to leave."""
        if not self.to_change:
            return []
        return [worker for worker in self.at("inside", "done") if worker.told < worker.generation]

    def next_members(self) -> tuple[int, ...] | None:
        """Members of the world that can be formed now; None: somebody has to come first.

        The first world waits for every worker that may still come; later ones for every living member of the last one.
        """
        waiting = self.at("waiting")
        if not waiting or self.at("inside", "done"):
            return None
        expected = self.at("starting", "down")
        if expected and all(worker.step is None for worker in waiting):
            # Nobody has a state: nothing is gained by beginning with fewer.
            return None
        return tuple(worker.index for worker in waiting)

    @property
    def over(self) -> bool:
        """A worker has come to the end of the run: nobody is taken in any more."""
        return bool(self.at("done"))

    @property
    def finished(self) -> bool:
        """Every member of the newest world that lives is done."""
        return self.over and not self.at("inside") and not self.to_change

    def behind(self, now: float, patience: float) -> list[Worker]:
        """Members that are hung though their processes live.

        They have not begun a step of the newest world which others began more than ``patience`` seconds ago, or have not
        come to the gate in that time, where others wait who have a state.
        """
        inside = self.at("inside")
        # What somebody began in an older world, newcomers could not begin.
        furthest = max((worker.entered for worker in inside), default=(0, -1))
        furthest = max(furthest, (self.generation, -1))
        since = min((worker.entered_at for worker in inside if worker.entered == furthest), default=now)
        slow = [worker for worker in inside if worker.entered < furthest and now - since > patience]
        if any(worker.step is not None for worker in self.at("waiting")):
            slow += [
                worker
                for worker in inside
                if worker not in slow and worker.told >= worker.generation and now - worker.told_at > patience
            ]
        return slow
