"""The process that holds one generation's coordination service: ``python -m parallel.failover.coordinator``.

It is started ahead of need, reads ``ADDRESS NODES HEARTBEAT`` from its standard input, answers ``ready`` once it listens,
and ends when its standard input does: with its supervisor, however that ends.
"""

import sys


def main() -> int:
    """Serve until the input ends; the exit code is 1 where the address cannot be had."""
    # Imported ahead of need, for it takes most of the time.
    import jaxlib._jax  # noqa: F401

    from parallel.failover.compat import serve

    print("started", flush=True)
    line = sys.stdin.readline().split()
    if not line:
        return 0
    address, nodes, heartbeat = line
    try:
        service = serve(address, int(nodes), int(heartbeat))
    except RuntimeError as error:
        print(f"failed {error}", flush=True)
        return 1
    print("ready", flush=True)
    sys.stdin.read()
    del service
    return 0


if __name__ == "__main__":
    sys.exit(main())
