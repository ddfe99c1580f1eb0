"""Start-up: ``import jaxllm``, and a fresh process up to its first trained step with a warm compilation cache."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _figures import spread
from _protocol import environment

IMPORT_JAXLLM = "import time; t = time.perf_counter(); import jaxllm; print(time.perf_counter() - t)"
IMPORT_TRANSFORMERS = "import time; t = time.perf_counter(); from transformers import NemotronHForCausalLM; print(time.perf_counter() - t)"
FIRST_STEP_AIM = 6.0


def seconds_printed(python: str, code: str, env: dict[str, str]) -> float:
    """What a fresh interpreter prints last."""
    done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def import_seconds(python: str, code: str, env: dict[str, str], times: int) -> dict[str, float] | None:
    """Spread over fresh interpreters, the first left out (cold files); None where the import fails."""
    try:
        return spread([seconds_printed(python, code, env) for _ in range(times + 1)][1:])
    except (OSError, subprocess.CalledProcessError):
        return None


def first_step(model: str, env: dict[str, str], times: int) -> dict[str, Any]:
    """From starting a process to its first trained step: cold, and spread of the warm runs."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, __file__, model], env=env, check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return {"cold": taken[0], "warm": spread(taken[1:]), "aim": FIRST_STEP_AIM}


def measure(model: str, pythons: dict[str, str], threads: int, runs: Path, times: int) -> dict[str, Any]:
    """Everything of this file, ``times`` warm runs each; with more than one also transformers' import, to compare."""
    env = environment(threads, runs / "cache-startup")
    theirs = None
    if times > 1:
        theirs = import_seconds(pythons["transformers"], IMPORT_TRANSFORMERS, env, 2)
    return {
        "import_jaxllm_seconds": import_seconds(sys.executable, IMPORT_JAXLLM, env, times),
        "import_transformers_seconds": theirs,
        "import_to_first_step_seconds": first_step(model, env, times),
    }


def train_one_step(model: str) -> None:
    """What the measured process does: a new model, one step on 8 rows of 256 tokens."""
    import jax
    import numpy as np
    from _tasks import OPTIMIZER, model_config, tokens_for

    from jaxllm import PackedBatch
    from jaxllm.train.optim import OptimConfig
    from jaxllm.train.state import init_state
    from jaxllm.train.step import make_train_step

    cfg = model_config(model)
    optim = OptimConfig(schedule="constant", warmup_steps=0, **OPTIMIZER)
    tokens = tokens_for(cfg.vocab_size, 8, 257)
    batch = PackedBatch.from_rows(tokens[:, :-1]).replace(targets=tokens[:, 1:, None].astype(np.int32))
    _, metrics = make_train_step(cfg, optim)(init_state(cfg, optim), batch)
    jax.block_until_ready(metrics)


if __name__ == "__main__":
    train_one_step(sys.argv[1])
