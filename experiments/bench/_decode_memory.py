"""Memory figures of ``decode``: bytes of a stored token, what a long answer holds, the peak of a long prompt."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

import jaxllm
from experiments.bench import _decode_cases as cases
from jaxllm import RKV, KVCache, KVReport, Policy
from jaxllm.cache.state import init_cache
from jaxllm.model import functional

ROOT = Path(__file__).parents[2]


def pool_case() -> dict[str, Any]:
    """Bytes of a token's keys and values in pools of each dtype, heads of 128."""
    cfg = cases.model(layers=1)
    tokens = 2**17

    def size(dtype: str) -> float:
        shapes = jax.eval_shape(lambda: _pools(cfg, tokens, dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) / tokens

    each = {dtype: size(dtype) for dtype in cases.DTYPES}
    return {"bytes_per_token": each, "int4_over_bfloat16": each["bfloat16"] / each["int4"]}


def _pools(cfg: Any, tokens: int, dtype: str) -> Any:
    state = init_cache(cfg, 1, tokens, KVCache(dtype, 16)).layers[0]
    return state.k, state.v


def curve_case(new: int) -> dict[str, Any]:
    """Tokens stored and bytes held over a generation of ``new`` tokens, dense and under R-KV."""
    cfg = cases.model(layers=1, width=64)
    lm = jaxllm.LanguageModel(cfg, functional.init_params(cfg))
    budget = min(1024, new // 4)
    curves = {}
    for name, policy in (("dense", Policy()), ("rkv", RKV(budget=budget))):
        report = KVReport()
        jaxllm.generate(
            lm,
            list(range(1, 65)),
            max_new_tokens=new,
            policy=policy,
            kv=KVCache(page_size=64),
            kv_report=report,
        )
        assert report.held is not None
        stored = report.stored_tokens()[:, 0]
        curves[name] = {
            "held_bytes": report.held.total,
            "stored": stored[:: max(1, len(stored) // 64)].tolist(),
            "most_stored": int(stored.max()),
        }
    return {"new_tokens": new, "budget": budget, "curves": curves}


def prefill(length: int) -> None:
    """Read a prompt of ``length`` tokens and print this process's peak of resident bytes."""
    cfg = cases.model(layers=1, width=64)
    assert cfg.attention is not None
    cfg = cfg.replace(attention=replace(cfg.attention, num_heads=4, num_kv_heads=1, head_dim=64))
    lm = jaxllm.LanguageModel(cfg, functional.init_params(cfg))
    jaxllm.generate(lm, [i % 4000 for i in range(length)], max_new_tokens=1, kv=KVCache("bfloat16"))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024)


def prefill_case(length: int) -> dict[str, Any]:
    """Peak memory of a prefill, in a process of its own."""
    argv = [sys.executable, "-m", "experiments.bench.decode", "--prefill", str(length)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    return {"length": length, "peak_bytes": int(done.stdout.split()[-1])}
