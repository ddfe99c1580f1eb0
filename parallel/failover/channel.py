"""JSON lines over a socket, between the supervisor and its workers."""

import json
import socket
from typing import Any

# Longer lines come from something that is no worker.
_LONGEST = 1 << 20


class Lines:
    """One end of a connection; a message is one line, so that it arrives whole or not at all."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._rest = b""

    def fileno(self) -> int:
        """For selectors."""
        return self.connection.fileno()

    def send(self, **message: Any) -> bool:
        """Send a message; False if the other end has gone."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages that have come whole, after one read; None: the other end has gone.

        Raises:
            TimeoutError: nothing came within the connection's timeout.
        """
        try:
            data = self.connection.recv(1 << 16)
        except (TimeoutError, BlockingIOError, InterruptedError):
            raise TimeoutError from None
        except OSError:
            return None
        if not data or len(self._rest) > _LONGEST:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in whole]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
