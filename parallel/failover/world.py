"""One generation of the run as JAX sees it: a fresh `jax.distributed` over the living, in processes that stay."""

import gc
from dataclasses import dataclass

from parallel.failover import compat

# The flag that bounds every collective on CPUs; without it a worker whose peer hangs waits for as long as that exists.
TIMEOUT_FLAG = "--xla_cpu_collective_timeout_seconds"


@dataclass(frozen=True)
class World:
    """Who trains together.

    Attributes:
        generation: counts changes of the membership, from 1.
        members: workers, ascending; a worker's index is its rank.
        workers: n; those that there are when all live.
        address: HOST:PORT of the coordination service.
    """

    generation: int
    members: tuple[int, ...]
    workers: int
    address: str


# Of the messages of an operation that failed because a peer has gone, or was too slow.
_MARKS = (
    "gloo",
    "connection closed",
    "connection reset",
    "coordination",
    "nccl",
    "collective",
    "deadline_exceeded",
    "unavailable",
)


def lost_peer(error: BaseException) -> bool:
    """Whether an operation failed for another process's sake: a fault of this one must not be tried again and again."""
    if not isinstance(error, RuntimeError | ValueError):
        return False
    text = str(error).lower()
    return any(mark in text for mark in _MARKS)


def with_timeout(flags: str, seconds: int) -> str:
    """XLA_FLAGS with the bound of collectives; one that stands there already stays."""
    return flags if TIMEOUT_FLAG in flags else f"{flags} {TIMEOUT_FLAG}={seconds}".strip()


def connect(world: World, worker: int, *, timeout: int = 600, heartbeat: int = 100) -> None:
    """Come to the coordination service, and wait there until all members have come.

    Args:
        world: to join; before anything asks JAX for devices, or after :func:`leave`.
        worker: which one this is.
        timeout: seconds to wait for the other members, after which jaxlib ends this process; the supervisor sends
            somebody in the place of one that has died.
        heartbeat: of the coordination service; the supervisor notices hangs sooner.
    """
    rank = world.members.index(worker)
    compat.connect(world.address, len(world.members), rank, timeout=timeout, heartbeat=heartbeat)


def meet() -> None:
    """Tell the other members of this one's devices, and learn of theirs.

    Raises:
        RuntimeError: a member died meanwhile, and nobody came in its place; after a minute.
    """
    import jax

    jax.devices()


def leave() -> None:
    """Give up the world: every array, device and compiled program made in it can no longer be used.

    Keep what shall outlive it as NumPy arrays, keys of random numbers included, and drop every reference to the others:
    the connections to the peers close with the last of them.
    """
    from parallel.distributed import forget

    forget()
    compat.disconnect()
    # Twice: caches of JAX let go of programs when the keys are gone that the first round collects.
    gc.collect()
    gc.collect()
