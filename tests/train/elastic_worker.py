"""A tiny run that must survive: ``elastic_worker.py supervise WORKERS FOLDER STEPS METHOD`` starts its workers.

METHOD/2 trains replicas of a pipeline of 2 stages, METHOD+save writes checkpoints. Prints the hash of the final state's
parameters, and how many tokens were seen; PAUSE seconds pass after every step. Worker 1 leaves its parameters.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.config import ModelConfig
from jaxllm.train.events import AssignmentEvent, StepEvent
from jaxllm.train.failover import FailoverSettings
from jaxllm.train.optim import OptimConfig
from jaxllm.train.settings import TrainSettings
from jaxllm.train.step import StepSettings
from parallel.mesh import MeshShape
from tests.train.tiny import TinyLoader, tiny_batch, tiny_config

ROWS, PAUSE = 12, 0.1
SETTINGS = StepSettings(loss_chunk=64)
# As long as the run, which is not said here.
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2)


class Rows(TinyLoader):
    """Any row of any batch."""

    batch_size = ROWS

    def __init__(self):
        super().__init__(ROWS)

    def rows_at(self, step, rows) -> PackedBatch:
        whole = tiny_batch(ROWS, 16, seed=step)
        rows = np.asarray(list(rows))
        found = jax.tree.map(lambda x: x[np.maximum(rows, 0)], whole)
        idle = rows < 0
        return found.replace(
            segment_ids=np.where(idle[:, None], 0, found.segment_ids),
            targets=np.where(idle[:, None, None], -1, found.targets),
        )


def model(stages: bool) -> ModelConfig:
    return tiny_config("*-*-" if stages else "*-", scan_layers=stages)


def digest(params) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def worker(folder: Path, steps: int, method: str) -> int:
    from jaxllm.train.elastic import elastic_fit
    from parallel.failover.membership import Member

    member, hits = Member(), []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
    log = open(folder / f"steps-{member.worker}.jsonl", "a", buffering=1)  # noqa: SIM115

    def watch(event) -> None:
        if isinstance(event, StepEvent):
            row = {"pid": os.getpid(), "step": event.step, "loss": event.loss, "tokens": event.tokens}
            log.write(json.dumps(row | {"members": jax.process_count()}) + "\n")
            time.sleep(PAUSE)
        elif isinstance(event, AssignmentEvent):
            with open(folder / f"jobs-{member.worker}.jsonl", "a") as file:
                file.write(json.dumps([list(event.jobs), list(event.jobs.values())]) + "\n")

    def evaluation():
        score = jax.jit(lambda params: sum(abs(leaf).sum() for leaf in jax.tree.leaves(params)))
        return lambda params, step: {"size": float(score(params))}

    method, _, saving = method.partition("+")
    method, _, stages = method.partition("/")
    mesh = MeshShape(data=member.workers // int(stages), stage=int(stages)) if stages else None
    result = elastic_fit(
        member,
        FailoverSettings(method),
        model(bool(stages)),
        OPTIM,
        Rows(),
        TrainSettings(steps=steps, step=SETTINGS, mesh=mesh, eval_every=5, save_every=7, save_seconds=None),
        folder=folder / "run" if saving else None,
        evaluation=evaluation,
        callbacks=[watch],
    )
    if member.worker == 1:
        np.savez(folder / "params.npz", *jax.tree.leaves(result.params))
    (folder / f"hits-{member.worker}").write_text(str(sum(hits)))
    print("HASH", result.step, digest(result.params), result.tokens_seen, result.values["size"], flush=True)
    return 0


def main() -> int:
    mode, workers, folder, steps, method = sys.argv[1:6]
    if mode == "worker":
        return worker(Path(folder), int(steps), method)
    from parallel.failover.supervisor import SupervisorOptions, supervise

    # Late enough that the others go on without it.
    backoff = 8.0 if "/" in method else 0.1
    options = SupervisorOptions(int(workers), collective_timeout=60, backoff=backoff)
    command = [sys.executable, __file__, "worker", workers, folder, steps, method]
    return supervise(command, options, folder=Path(folder))


if __name__ == "__main__":
    sys.exit(main())
