"""Several processes as one run: `jax.distributed` started from what the launcher left in the environment.

JAX itself knows SLURM, Open MPI, Kubernetes (indexed jobs; needs the package ``kubernetes``) and Cloud TPU. What is here
tells which launcher it is, says by name which variable is missing, and reads the plain variables of everything else:
other MPIs, torchrun, indexed jobs without a service account, or a shell script.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# Of a launcher: how many processes, which is this, which is it on its host (or None).
RANKS = {
    "plain variables": ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_PROCESS_ID"),
    "torchrun": ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
}
# The launcher's other names for the address at which process 0 listens, as HOST:PORT.
ADDRESS = "JAX_COORDINATOR_ADDRESS"


class LaunchError(RuntimeError):
    """The environment of a launcher lacks a variable, or has one that cannot be used; the message names it."""


@dataclass(frozen=True)
class Launch:
    """How to start; what is None JAX finds out itself.

    Attributes:
        launcher: which one it is.
        coordinator: HOST:PORT of process 0.
        processes: how many there are.
        process: which this is.
        devices: of this host's accelerators those that are this process's; None: all, one process per host.
        detection: the name of JAX's own detection; None: everything is given.
    """

    launcher: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = None
    detection: str | None = None


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """The launch that an environment describes; None: a single process.

    Args:
        environment: ``os.environ``. ``JAX_COORDINATOR_ADDRESS`` with ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` goes
            before every launcher's own variables; ``JAX_LOCAL_PROCESS_ID`` besides gives each process one accelerator.

    Raises:
        LaunchError: a launcher's variables are there in part, or are no numbers.
    """
    has = environment.__contains__
    if ADDRESS in environment or "JAX_NUM_PROCESSES" in environment or "JAX_PROCESS_ID" in environment:
        # With the address alone the launcher's ranks count.
        for launcher, (size, *_) in RANKS.items():
            if size in environment:
                return _ranked(environment, launcher)
        if all(map(has, SLURM)):
            return Launch("SLURM", environment[ADDRESS], detection="slurm")
        return _ranked(environment, "plain variables")
    if _many(environment, "SLURM_NTASKS") and "SLURM_PROCID" in environment:
        _require(environment, "SLURM", SLURM, "start the processes with srun, not from the batch script")
        return Launch("SLURM", detection="slurm")
    if _many(environment, "OMPI_COMM_WORLD_SIZE"):
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return Launch("Open MPI", detection="ompi")
        return _ranked(environment, "Open MPI")
    if _many(environment, "WORLD_SIZE"):
        return _ranked(environment, "torchrun")
    if _many(environment, "PMI_SIZE"):
        return _ranked(environment, "MPI")
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return Launch("Kubernetes", detection="k8s")
    return None


def _many(environment: Mapping[str, str], name: str) -> bool:
    """Whether a launcher started more than one process; a job of one needs no start-up."""
    return name in environment and _number(environment, name) > 1


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name].strip()
    if not text.isdecimal():
        raise LaunchError(f"{name}={environment[name]!r}: must be a whole number of at least 0")
    return int(text)


def _require(environment: Mapping[str, str], launcher: str, names: tuple[str, ...], remedy: str) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        raise LaunchError(
            f"{' and '.join(missing)} missing: {launcher} started this run of several processes; {remedy}"
        )


def _ranked(environment: Mapping[str, str], launcher: str) -> Launch:
    size, rank, local = RANKS[launcher]
    address = environment.get(ADDRESS)
    if launcher == "torchrun" and address is None:
        _require(environment, launcher, ("MASTER_ADDR", "MASTER_PORT", size, rank), "set them")
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    _require(environment, launcher, (size, rank), "set them to the number of processes and to this one's")
    if address is None:
        raise LaunchError(
            f"{ADDRESS} missing: {launcher} started this run of several processes; set it to HOST:PORT of process 0"
        )
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise LaunchError(f"{ADDRESS}={address!r}: must be HOST:PORT of process 0, such as node0:12345")
    processes, process = _number(environment, size), _number(environment, rank)
    if process >= processes:
        raise LaunchError(f"{rank}={process}: must be below {size}={processes}")
    devices = (_number(environment, local),) if local in environment else None
    return Launch(launcher, address, processes, process, devices)


def start(environment: Mapping[str, str], *, timeout: int = 300) -> Launch | None:
    """Join the run that the environment describes; call it before anything asks JAX for its devices.

    Args:
        environment: as in :func:`find_launch`.
        timeout: seconds to wait for the others.

    Returns:
        how it was started; None for a single process, where nothing is done.

    Raises:
        LaunchError: see :func:`find_launch`; or JAX could not start with what the launcher left.
    """
    launch = find_launch(environment)
    if launch is None:
        return None
    try:
        jax.distributed.initialize(
            coordinator_address=launch.coordinator,
            num_processes=launch.processes,
            process_id=launch.process,
            local_device_ids=launch.devices,
            cluster_detection_method=launch.detection or "deactivate",
            initialization_timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(f"{launch.launcher}: the processes did not come together: {error}") from error
    return launch


def agreed(*values: int) -> tuple[int, ...]:
    """The largest of each value that any process has, in every process; all have to call it, with 32-bit integers."""
    if jax.process_count() == 1:
        return values
    devices = np.asarray(jax.devices())
    mesh = Mesh(devices, ("all",))
    row = np.asarray([values], np.int32)
    each = jax.make_array_from_callback(
        (len(devices), len(values)), NamedSharding(mesh, PartitionSpec("all")), lambda index: row
    )
    return tuple(int(value) for value in np.asarray(_largest(mesh)(each)))


@lru_cache
def _largest(mesh: Mesh) -> Any:
    return jax.jit(lambda x: jnp.max(x, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))


def forget() -> None:
    """Drop what is kept of the devices, before ``jax.distributed`` is started anew in this process."""
    _largest.cache_clear()
