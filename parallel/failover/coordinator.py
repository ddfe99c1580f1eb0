"""The process that holds one generation's coordination service: ``python -m parallel.failover.coordinator``.

It is started ahead of need, reads one line from its standard input, and ends when that does: with its supervisor, however
that ends. ``serve ADDRESS NODES HEARTBEAT`` makes it a service, which answers ``ready`` once it listens. ``stand ADDRESS RANK
HEARTBEAT`` lets it come to a service in the place of a member that died on its way there: the others could otherwise not go
on, and after a while would be ended by jaxlib.
"""

import sys


def main() -> int:
    """Serve until the input ends; the exit code is 1 where the address cannot be had."""
    # Imported ahead of need, for it takes most of the time.
    import jaxlib._jax  # noqa: F401

    from parallel.failover.compat import register, serve

    line = sys.stdin.readline().split()
    if not line:
        return 0
    task, address, number, heartbeat = line
    try:
        if task == "serve":
            held = serve(address, int(number), int(heartbeat))
        else:
            held = register(address, int(number), timeout=60, heartbeat=int(heartbeat))
    except RuntimeError as error:
        print(f"failed {error}", flush=True)
        return 1
    print("ready", flush=True)
    sys.stdin.read()
    del held
    return 0


if __name__ == "__main__":
    sys.exit(main())
