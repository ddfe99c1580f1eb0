"""The process that holds one generation's coordination service: ``python -m parallel.failover.coordinator``.

It is started ahead of need, reads one line from its standard input, and ends when that does: with its supervisor, however
that ends. ``serve ADDRESS NODES HEARTBEAT`` makes it a service, which answers ``ready`` once it listens. ``stand ADDRESS NODES
HEARTBEAT RANK`` lets it come to a service in the place of a member that died on its way into the world: the others could
otherwise not go on, and after a while would be ended by jaxlib, or wait a minute for that member's devices.
"""

import sys


def main() -> int:
    """Serve until the input ends; the exit code is 1 where the address cannot be had."""
    # Imported ahead of need, for it takes most of the time.
    import jaxlib._jax  # noqa: F401

    from parallel.failover.compat import serve, take_place

    line = sys.stdin.readline().split()
    if not line:
        return 0
    task, address, nodes, heartbeat, *rank = line
    held = None
    try:
        if task == "serve":
            held = serve(address, int(nodes), int(heartbeat))
        else:
            take_place(address, int(nodes), int(rank[0]), timeout=60, heartbeat=int(heartbeat))
    except RuntimeError as error:
        print(f"failed {error}", flush=True)
        return 1
    print("ready", flush=True)
    sys.stdin.read()
    del held
    return 0


if __name__ == "__main__":
    sys.exit(main())
