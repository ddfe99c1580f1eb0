"""Who trained what: a line for every step that a worker of an elastic run begins."""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path


class Ledger:
    """``rows-WORKER.jsonl`` in a run's folder.

    A line is written before the step runs, so that none is missing however its writer ends; whether the step counts is told
    by the step with which the next world begins. Rows -1 are the padding of idle slots and left out.
    """

    def __init__(self, folder: Path, worker: int):
        """Append to the worker's file; earlier processes of the same worker wrote there too."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / f"rows-{worker}.jsonl", "a", buffering=1)  # noqa: SIM115

    def begin(self, step: int, updates: int, generation: int, rows: Iterable[int]) -> None:
        """Add a line.

        Args:
            step: which batch, from 0.
            updates: batches that the state was trained on, as it counts itself.
            generation: of the world.
            rows: of the batch that this worker trains.
        """
        row = {"time": round(time.time(), 3), "pid": os.getpid(), "generation": generation}
        row |= {"step": step, "updates": updates, "rows": [int(each) for each in rows if each >= 0]}
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
