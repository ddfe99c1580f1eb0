"""transformers' caches beside ours, for ``decode``: the same model and contexts, taking turns in one run.

torch and transformers are loaded in workers only. A peer that cannot run stands in the row with its reason.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import jaxllm
from experiments.bench import _decode_cases as cases
from experiments.bench._decode_runs import STEPS, Decoder, clocked, turns
from experiments.bench._protocol import Worker, WorkerError, environment
from experiments.bench._tasks import tokens_for
from jaxllm import KVCache, hf
from jaxllm.model import functional

# Name to (dtype of weights and activations, cache). The quantised ones are transformers' backends: "quanto" keeps 4 bits
# and its last 128 tokens whole, "fp8" 8 bits.
PEERS = {
    "static float32": ("float32", "static"),
    "static bfloat16": ("bfloat16", "static"),
    "quanto int4": ("bfloat16", "quanto"),
    "hqq int4": ("bfloat16", "hqq"),
    "fp8": ("bfloat16", "fp8"),
}
# Ours: name to (policy, dtype of keys).
OURS = {
    "dense bfloat16": ("dense", "bfloat16"),
    "dense int4": ("dense", "int4"),
    "quest int4": ("quest", "int4"),
}
# Most difference of logits over their spread.
LIMIT = {"float32": 1e-3, "bfloat16": 0.1}
_LENGTH = 64
_PATIENCE = 600.0


def peers_case(
    context: int, repeats: int, python: str, names: tuple[str, ...] = tuple(PEERS)
) -> dict[str, Any]:
    """Milliseconds a token of ours and of transformers' caches, every one in each round."""
    cfg = cases.model()
    lm = jaxllm.LanguageModel(cfg, functional.init_params(cfg))
    calls: dict[str, Callable[[], float]] = {}
    for name, (policy, dtype) in OURS.items():
        ours = Decoder(cfg, lm.params, context, KVCache(dtype), cases.policies(context)[policy])
        calls[f"jaxllm {name}"] = clocked(ours.step)
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hf.save(lm, folder / "weights", family="qwen3")
        wanted = _logits(lm)
        for name in names:
            try:
                worker = stack.enter_context(_peer(name, folder, python, context, wanted, versions))
            except WorkerError as error:
                missing[f"transformers {name}"] = str(error)
                continue
            calls[f"transformers {name}"] = partial(worker.call, "step", _PATIENCE, steps=STEPS)
        seconds = turns(calls, repeats)
    ms = {name: each / STEPS * 1e3 for name, each in seconds.items()}
    return {"context": context, "ms_per_token": ms, "missing": missing, "versions": versions}


def _logits(lm: Any) -> np.ndarray:
    batch = jaxllm.PackedBatch.from_rows(tokens_for(lm.cfg.vocab_size, 1, _LENGTH))
    return np.asarray(functional.merge(lm.cfg, lm.params)(batch), np.float32)


@contextmanager
def _peer(
    name: str, folder: Path, python: str, context: int, wanted: np.ndarray, versions: dict[str, str]
) -> Iterator[Worker]:
    """A worker with a filled cache.

    Raises:
        WorkerError: it does not start, lacks a package, or is not the same model.
    """
    dtype, cache = PEERS[name]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    script = Path(__file__).with_name("_worker_decode.py")
    log = folder / f"{name}.log"
    with closing(Worker([python, str(script)], environment(threads, folder / "cache"), log)) as worker:
        told = worker.call("setup", _PATIENCE, weights=str(folder / "weights"), dtype=dtype, threads=threads)
        file = folder / f"{name}.npy"
        worker.call("check", _PATIENCE, length=_LENGTH, file=str(file))
        error = float(np.max(np.abs(np.load(file) - wanted)) / np.std(wanted))
        if not error <= LIMIT[dtype]:
            raise WorkerError(f"logits differ by {error:.1e} of their spread: not the same model")
        worker.call("fill", _PATIENCE, cache=cache, context=context, room=cases.ROOM)
        worker.call("step", _PATIENCE, steps=1)
        length = worker.call("length", _PATIENCE)
        if length != context + 1:
            raise WorkerError(f"the cache holds {length} tokens, not {context + 1}")
        versions.update(told["versions"])
        yield worker
