"""A short training run in a process of its own: ``kill_worker.py FOLDER STEPS COUNT DELAY [term]``.

COUNT 0 trains to the end and prints the hash of the final state; else the process gets SIGKILL (or SIGTERM) DELAY
seconds after it has reported COUNT steps.
"""

import hashlib
import os
import signal
import sys
import threading

import jax
import numpy as np

from jaxllm.train.events import StepEvent
from jaxllm.train.settings import TrainSettings
from jaxllm.train.state import abstract_state
from jaxllm.train.trainer import fit
from tests.train.tiny import TinyLoader, constant_lr, tiny_config


def main() -> None:
    folder, steps, count, delay = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    number = signal.SIGTERM if "term" in sys.argv else signal.SIGKILL

    reported = []

    def watch(event) -> None:
        if isinstance(event, StepEvent):
            reported.append(event.step)
        if isinstance(event, StepEvent) and len(reported) == count:
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()

    cfg, optim = tiny_config("M-"), constant_lr()
    settings = TrainSettings(steps=steps, save_every=2, keep=2)
    result = fit(cfg, optim, TinyLoader(), settings, folder=folder, callbacks=[watch])
    if result.interrupted:
        print(result.how_to_go_on)
        return
    from jaxllm.train.checkpoint import Checkpoints

    found = Checkpoints(os.path.join(folder, "checkpoints")).restore_latest(abstract_state(cfg, optim), cfg)
    assert found is not None and found.step == steps == result.step
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(found.state):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    print("HASH", digest.hexdigest(), result.tokens_seen)


main()
