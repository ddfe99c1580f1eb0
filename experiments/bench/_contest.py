"""One model's workers, and the rounds in which they take turns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _figures import LOGIT_LIMIT, gate, rate, repeats_for, spread
from _protocol import Worker, WorkerError, environment
from _tasks import JAXLLM, Contender, Task

# Rows and tokens of the batch whose logits are compared before anything is timed.
CHECK = (2, 64)


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        pythons: interpreter of each library.
        threads: cores that every contender gets.
        rounds: turns of each contender in a row of the table.
        least_seconds: about how long one turn lasts.
        patience: most seconds that a compilation, or a turn, may take.
        runs: run folder: weights, caches, logs.
    """

    pythons: dict[str, str]
    threads: int
    rounds: int
    least_seconds: float
    patience: float
    runs: Path


class Contest:
    """The contenders on one model, each in a process of its own that lives as long as rows need it."""

    def __init__(
        self, model: str, config: dict[str, Any], contenders: Sequence[Contender], settings: Settings
    ):
        self.model, self.config, self.settings = model, config, settings
        self.contenders = list(contenders)
        self.weights = settings.runs / "weights" / model
        self.versions: dict[str, str] = {}
        self._workers: dict[str, Worker] = {}
        self._excluded: dict[str, str] = {}
        self._exported = False
        self._parameters: int | None = None
        self._logits: Any = None

    def _spawn(self, contender: Contender) -> Worker:
        s = self.settings
        command = [s.pythons[contender.library], str(contender.script)]
        log = s.runs / "logs" / f"{self.model}-{contender.name.replace(' ', '-')}.log"
        return Worker(command, environment(s.threads, s.runs / "cache"), log)

    def worker(self, contender: Contender) -> Worker:
        """Its live, set-up and checked process.

        Raises:
            WorkerError: it does not start, or what it computes is not what jaxllm computes.
        """
        if contender.name in self._excluded:
            raise WorkerError(self._excluded[contender.name])
        worker = self._workers.get(contender.name)
        if worker is not None and worker.alive:
            return worker
        worker = self._workers[contender.name] = self._spawn(contender)
        try:
            self._set_up(contender, worker)
        except WorkerError as error:
            self._excluded[contender.name] = str(error)
            worker.close()
            raise
        return worker

    def _set_up(self, contender: Contender, worker: Worker) -> None:
        common = {"config": self.config, "threads": self.settings.threads}
        if contender == JAXLLM[0] and not self._exported:
            # The first contender makes the weights that all load.
            worker.call("export", self.settings.patience, folder=str(self.weights), **common)
            self._exported = True
        told = worker.call(
            "setup",
            self.settings.patience,
            weights=str(self.weights),
            precision=contender.precision,
            mode=contender.mode,
            **common,
        )
        self.versions |= told["versions"]
        self._check(contender, worker, told)

    def _check(self, contender: Contender, worker: Worker, told: dict[str, Any]) -> None:
        import numpy as np

        count = told.get("parameters")
        if count is None:
            return
        self._parameters = count if self._parameters is None else self._parameters
        if count != self._parameters:
            raise WorkerError(f"{count} parameters, but jaxllm has {self._parameters}: not the same model")
        if contender.library == "jla":
            return
        file = self.settings.runs / "logs" / f"{self.model}-{contender.name.replace(' ', '-')}.npy"
        worker.call("check", self.settings.patience, rows=CHECK[0], length=CHECK[1], file=str(file))
        logits = np.load(file)
        if self._logits is None:
            if (contender.library, contender.precision) != ("jaxllm", "fp32"):
                raise WorkerError("nothing to compare with: jaxllm fp32 did not start")
            self._logits = logits
        error = float(np.max(np.abs(logits - self._logits)) / np.std(self._logits))
        if not error <= LOGIT_LIMIT[contender.precision]:
            raise WorkerError(f"logits differ by {error:.1e} of their spread: not the same model")

    def row(self, task: Task, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure one task: every contender prepares, then they take turns for some rounds."""
        entries: dict[str, Any] = {}
        ready: list[tuple[Contender, Worker, int]] = []
        reference: dict[str, Any] | None = None
        for contender in (c for c in self.contenders if task.kind in c.kinds):
            tell(f"{self.model} {task.name}: {contender.name} gets ready")
            entry = entries[contender.name] = {
                "library": contender.library,
                "precision": contender.precision,
                "mode": contender.mode,
            }
            started = time.perf_counter()
            try:
                worker = self.worker(contender)
                answer = worker.call("prepare", self.settings.patience, task=asdict(task))
            except WorkerError as error:
                entry["error"] = str(error)
                continue
            entry["prepare_seconds"] = time.perf_counter() - started
            if contender.name == "jaxllm fp32":
                reference = answer
            failed, seen = gate(contender, answer, reference)
            entry |= seen
            if failed:
                entry["error"] = failed
                continue
            ready.append((contender, worker, repeats_for(answer["once"], self.settings.least_seconds)))
        self._rounds(task, ready, entries, tell)
        return {"model": self.model, "name": task.name, "task": asdict(task), "contenders": entries}

    def _rounds(
        self, task: Task, ready: list[Any], entries: dict[str, Any], tell: Callable[[str], None]
    ) -> None:
        for number in range(self.settings.rounds):
            tell(f"{self.model} {task.name}: round {number + 1} of {self.settings.rounds}")
            # Whoever comes first meets the machine as the last row left it: take turns at that as well.
            turn = number % max(1, len(ready))
            for contender, worker, repeats in ready[turn:] + ready[:turn]:
                entry = entries[contender.name]
                if entry.get("error"):
                    continue
                try:
                    answer = worker.call("measure", self.settings.patience, repeats=repeats)
                except WorkerError as error:
                    entry["error"] = str(error)
                    continue
                try:
                    entry.setdefault("rounds", []).append(rate(task, contender.library, answer))
                except ValueError:
                    entry["drowned_rounds"] = entry.get("drowned_rounds", 0) + 1
                entry["peak_rss_mib"] = max(entry.get("peak_rss_mib", 0), answer["peak_rss_mib"])
        for entry in entries.values():
            if entry.get("rounds"):
                entry["tokens_per_second"] = spread(entry["rounds"])
            elif entry.get("drowned_rounds"):
                entry["error"] = "noise drowned every round"

    def keep(self, kind: str | None) -> None:
        """End the workers that take no part in ``kind``; None ends all."""
        for contender in self.contenders:
            if kind not in contender.kinds and contender.name in self._workers:
                self._workers.pop(contender.name).close()
