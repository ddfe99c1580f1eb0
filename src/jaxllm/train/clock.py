"""Training time: seconds that count towards a budget, and speed over the last steps."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Counts while it is not paused; ``elapsed`` goes on from that of a resumed run."""

    def __init__(self, elapsed: float = 0.0, window: int = 20):
        self._start = time.perf_counter() - elapsed
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)

    @property
    def elapsed(self) -> float:
        """Seconds of training."""
        return time.perf_counter() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - begin

    def mark(self, tokens: int) -> float:
        """Note that ``tokens`` more are done; tokens per second over the last steps (0 at the first)."""
        total = (self._marks[-1][1] if self._marks else 0) + tokens
        self._marks.append((self.elapsed, total))
        (first, before), (last, after) = self._marks[0], self._marks[-1]
        return (after - before) / (last - first) if last > first else 0.0
