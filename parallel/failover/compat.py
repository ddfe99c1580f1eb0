"""What JAX has no public name for: a coordination service outside the workers, and a client of it (jax 0.10 to 0.12)."""

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


def connect(address: str, nodes: int, rank: int, *, timeout: int, heartbeat: int) -> None:
    """Do what ``jax.distributed.initialize`` does, but for starting a service in process 0."""
    import jax
    from jax._src import distributed

    jax.config.update("jax_enable_recoverability", True)
    # A worker that dies while the others tell each other of their devices must not hold them for the usual five minutes.
    jax.config.update("jax_cpu_get_local_topology_timeout_minutes", 1)
    jax.config.update("jax_cpu_get_global_topology_timeout_minutes", 1)
    client = register(address, rank, timeout=timeout, heartbeat=heartbeat)
    state = distributed.global_state
    state.coordinator_address, state.num_processes, state.process_id = address, nodes, rank
    state.client = client


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
