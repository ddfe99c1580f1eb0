"""What JAX has no public name for: a coordination service outside the workers, and a client of it (jax 0.10 to 0.12)."""

import platform
import re
from functools import cache
from pathlib import Path
from typing import Any


def serve(address: str, nodes: int, heartbeat: int) -> Any:
    """A coordination service for ``nodes`` processes; it lives as long as what is returned.

    Imports jaxlib only, a quarter of a second; the service is recoverable: it tells nobody of a process that is gone.

    Args:
        address: HOST:PORT to listen on.
        nodes: processes that will come.
        heartbeat: seconds without a sign after which a process counts as gone; one that comes back aborts itself.
    """
    from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

    return _jax.get_distributed_runtime_service(
        address, nodes, heartbeat_timeout=heartbeat, shutdown_timeout=1, recoverable=True
    )


def register(address: str, rank: int, *, timeout: int, heartbeat: int) -> Any:
    """A client of the service, once all processes have come; jaxlib ends this process if they do not in ``timeout``."""
    from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

    client = _jax.get_distributed_runtime_client(
        address,
        rank,
        init_timeout=timeout,
        shutdown_timeout=1,
        heartbeat_timeout=heartbeat,
        shutdown_on_destruction=False,
        use_compression=True,
    )
    client.connect()
    return client


@cache
def share_programs() -> None:
    """Let processes of CPUs find each other's programs in JAX's persistent compilation cache.

    Its key has a fingerprint of the devices, for CPUs that of the asking process's own, and only process 0 writes: all others
    would compile every program again in each new world. Programs of several processes get a key of their devices' kind and
    what the CPU can do; those of one process, and of accelerators, keep theirs.
    """
    from jax._src import cache_key

    own = cache_key._hash_accelerator_config

    def shared(hashed: Any, devices: Any) -> None:
        if {each.platform for each in devices.flat} != {"cpu"} or len(
            {each.process_index for each in devices.flat}
        ) < 2:
            own(hashed, devices)
        else:
            hashed.update(
                " ".join([*(f"{each.id}:{each.device_kind}" for each in devices.flat), _abilities()]).encode()
            )

    cache_key._hash_accelerator_config = shared


def _abilities() -> str:
    """What programs for this host's CPU may use."""
    info = Path("/proc/cpuinfo")
    found = (
        re.search(r"^(flags|Features)\s*:(.*)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    )
    return f"{platform.machine()} {found[2] if found else platform.processor()}"


def connect(address: str, nodes: int, rank: int, *, timeout: int, heartbeat: int) -> None:
    """Do what ``jax.distributed.initialize`` does, but for starting a service in process 0."""
    import jax
    from jax._src import distributed

    share_programs()
    jax.config.update("jax_enable_recoverability", True)
    # A worker that dies while the others tell each other of their devices must not hold them for the usual five minutes.
    jax.config.update("jax_cpu_get_local_topology_timeout_minutes", 1)
    jax.config.update("jax_cpu_get_global_topology_timeout_minutes", 1)
    client = register(address, rank, timeout=timeout, heartbeat=heartbeat)
    state = distributed.global_state
    state.coordinator_address, state.num_processes, state.process_id = address, nodes, rank
    state.client = client


def take_place(address: str, nodes: int, rank: int, *, timeout: int, heartbeat: int) -> None:
    """Come to the service as process ``rank``, which has died, and tell the others of a device as it would have done.

    They wait for that for a minute otherwise, as they do still where devices are not CPUs: this process takes no other. What
    the dead one told of itself is taken back first: keys are set once.
    """
    import jax
    from jax._src import distributed

    jax.config.update("jax_platforms", "cpu")
    connect(address, nodes, rank, timeout=timeout, heartbeat=heartbeat)
    client = distributed.global_state.client
    assert client is not None
    for key in (f"cpu:local_topology/cpu/{rank}", *(("cpu:global_topology/cpu",) if rank == 0 else ())):
        client.key_value_delete(key)
    jax.devices()


def disconnect() -> None:
    """Leave the service, and forget the devices, arrays and programs that were made with it."""
    import jax.extend.backend
    from jax._src import distributed

    state = distributed.global_state
    client, state.client = state.client, None
    state.coordinator_address, state.num_processes, state.process_id = None, 1, 0
    if client is not None:
        client.shutdown()
    jax.extend.backend.clear_backends()
