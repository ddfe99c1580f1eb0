"""Memory figures of ``decode``: bytes of a stored token, what a long answer holds, the peak of a long prompt."""

import json
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
# Tokens of the prompt of a long answer, and of one piece of a long prompt.
PROMPT, PIECE = 64, 512


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


def _small() -> Any:
    """One narrow attention layer: what grows with the text is nearly all that it needs."""
    cfg = cases.model(layers=1, width=64)
    assert cfg.attention is not None
    cfg = cfg.replace(attention=replace(cfg.attention, num_heads=2, num_kv_heads=2))
    return jaxllm.LanguageModel(cfg, functional.init_params(cfg))


def curve(name: str, length: int, budget: int) -> dict[str, Any]:
    """What a text of ``length`` tokens holds, most of them generated: "dense", or "rkv" with ``budget``."""
    report = KVReport()
    jaxllm.generate(
        _small(),
        list(range(1, PROMPT + 1)),
        max_new_tokens=length - PROMPT,
        policy=RKV(budget=budget) if name == "rkv" else Policy(),
        kv=KVCache(page_size=64),
        kv_report=report,
        steps_per_call=128,
    )
    assert report.held is not None
    stored = report.stored_tokens()[:, 0]
    return {
        "length": length,
        "held_bytes": report.held.total,
        "peak_bytes": _peak(),
        "most_stored": int(stored.max()),
        "stored": stored[:: max(1, len(stored) // 64)].tolist(),
    }


def curve_case(new: int) -> dict[str, Any]:
    """Tokens stored, bytes held and peak memory of texts of up to ``new`` tokens, dense and under R-KV.

    Each in a process of its own; tokens stored over time of the longest only.
    """
    budget = min(1024, new // 8)
    curves: dict[str, Any] = {}
    for name in ("dense", "rkv"):
        texts = [_alone("--curve", name, str(new >> shift), str(budget)) for shift in (2, 1, 0)]
        longest = texts[-1]
        curves[name] = {key: longest[key] for key in ("held_bytes", "peak_bytes", "most_stored", "stored")}
        curves[name]["texts"] = [{k: text[k] for k in text if k != "stored"} for text in texts]
    return {"new_tokens": new, "budget": budget, "curves": curves}


def _alone(*arguments: str) -> dict[str, Any]:
    """What ``decode`` with ``arguments`` prints last, in a process of its own."""
    argv = [sys.executable, "-m", "experiments.bench.decode", *arguments]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> int:
    """Most resident bytes of this process so far."""
    # Not getrusage: its maximum survives exec, so a child would inherit that of its parent.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def prefill(length: int) -> dict[str, Any]:
    """Read a prompt of ``length`` tokens; this process's peak of resident bytes."""
    jaxllm.generate(
        _small(), [i % 4000 for i in range(length)], max_new_tokens=1, kv=KVCache("bfloat16"), chunk=PIECE
    )
    return {"length": length, "chunk": PIECE, "peak_bytes": _peak()}


def prefill_case(length: int) -> dict[str, Any]:
    """Peak memory of a prefill, in a process of its own."""
    return _alone("--prefill", str(length))
