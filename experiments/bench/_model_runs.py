"""One row of the whole-model benchmark: built, run, timed."""

import functools
import gc
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench._model_work import CHUNK, SETTINGS, Row, decode_bytes, memory, precise
from jaxllm import PackedBatch
from jaxllm.cache.state import init_cache
from jaxllm.config import ModelConfig
from jaxllm.generation.sampling import Features, init_sampling
from jaxllm.generation.steps import decode_step, prefill
from jaxllm.model.functional import abstract_params, map_named
from jaxllm.train.flops import forward_flops_per_token, training_flops_per_token
from jaxllm.train.memory import is_out_of_memory
from jaxllm.train.optim import OptimConfig
from jaxllm.train.state import init_state
from jaxllm.train.step import make_train_step
from pallas_kernels import dispatch

# Decode steps of one call, so that what the host does between calls does not count.
STEPS = 16
Figures = dict[str, Any]


def _timed(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, compilation included, and the median of the others."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:])


@functools.cache
def _draw(shape: tuple[int, ...], dtype: str) -> Any:
    return jax.jit(lambda key: (0.02 * jax.random.normal(key, shape)).astype(dtype))


def random_params(cfg: ModelConfig) -> Any:
    """Small random weights, one after the other, so that no more than one is held in float32."""

    def leaf(name: str, aval: Any) -> jax.Array:
        key = jax.random.key(zlib.crc32(name.encode()))
        return jax.block_until_ready(_draw(aval.shape, aval.dtype.name)(key))

    return map_named(leaf, abstract_params(cfg))


def train(row: Row, cfg: ModelConfig, repeats: int) -> Figures:
    """Whole steps: gradients of packed rows, clipping, AdamW."""
    optim = OptimConfig(schedule="constant", warmup_steps=0)
    state = init_state(cfg, optim)
    tokens = jax.random.randint(jax.random.key(1), (row.batch, row.length), 0, cfg.vocab_size)
    batch = PackedBatch.from_rows(tokens).replace(
        targets=tokens[..., None], loss_mask=jnp.ones(tokens.shape, jnp.float32)
    )
    step = make_train_step(cfg, optim, SETTINGS)
    metrics: Any = None

    def call() -> Any:
        nonlocal state, metrics
        state, metrics = step(state, batch, None)
        return metrics.loss

    first, seconds = _timed(call, repeats)
    if not bool(jnp.isfinite(metrics.loss)):
        raise RuntimeError("the loss is not finite: the step is wrong, and its time means nothing")
    count = row.batch * row.length
    return {
        "first_call_seconds": first,
        "seconds": seconds,
        "tokens_per_s": count / seconds,
        "flops_per_s": count * training_flops_per_token(cfg, row.length) / seconds,
        "loss": float(metrics.loss),
    }


def read_prompt(row: Row, cfg: ModelConfig, repeats: int) -> Figures:
    """A whole prompt in chunks, as the engine reads it."""
    params, features = random_params(cfg), Features()
    cache, sampling = init_cache(cfg, row.batch, row.length), init_sampling(row.batch)
    tokens = jax.random.randint(jax.random.key(1), (row.batch, row.length), 0, cfg.vocab_size)
    slots = jnp.arange(row.batch, dtype=jnp.int32)[:, None]
    chunk = min(CHUNK, row.length)
    chunks = [
        PackedBatch.from_rows(tokens[:, begin : begin + chunk], offset=begin, slots=slots)
        for begin in range(0, row.length, chunk)
    ]
    final = jnp.zeros(row.batch, bool)

    def call() -> Any:
        nonlocal cache, sampling
        for part in chunks:
            out, cache, sampling = prefill(params, part, cache, sampling, final, cfg=cfg, features=features)
        return out

    first, seconds = _timed(call, repeats)
    count = row.batch * row.length
    return {
        "first_call_seconds": first,
        "seconds": seconds,
        "tokens_per_s": count / seconds,
        "flops_per_s": count * forward_flops_per_token(cfg, row.length) / seconds,
    }


def decode(row: Row, cfg: ModelConfig, repeats: int) -> Figures:
    """Steps around the middle of the answer, over pools that hold as many tokens; what they hold does not matter."""
    params, capacity = random_params(cfg), row.length + row.new
    steps = min(STEPS, row.new // (repeats + 1))
    start = row.length + row.new // 2 - steps * (repeats + 1) // 2
    sampling = replace(
        init_sampling(row.batch),
        position=jnp.full(row.batch, start, jnp.int32),
        live=jnp.ones(row.batch, bool),
        remaining=jnp.full(row.batch, capacity, jnp.int32),
    )
    cache = init_cache(cfg, row.batch, capacity)
    out: Any = None

    def call() -> Any:
        nonlocal cache, sampling, out
        out, cache, sampling = decode_step(
            params, cache, sampling, cfg=cfg, features=Features(), rows=row.batch, k=steps
        )
        return out.tokens

    first, seconds = _timed(call, repeats)
    if not bool(jnp.all(out.tokens >= 0)):
        raise RuntimeError("a row stopped: the steps did not decode all of them")
    length = row.length + row.new // 2
    step = seconds / steps
    return {
        "first_call_seconds": first,
        "seconds": step,
        "tokens_per_s": row.batch / step,
        "flops_per_s": row.batch * forward_flops_per_token(cfg, 2 * length - 1) / step,
        "bytes_per_s": decode_bytes(cfg, row.batch, length) / step,
    }


KINDS = {"train": train, "prefill": read_prompt, "decode": decode}


def measure(row: Row, cfg: ModelConfig, room: int | None, repeats: int) -> Figures:
    """The figures of a row, or ``error``: why there are none. Nothing but a dead process ends the run.

    Args:
        row: what to measure.
        cfg: its model.
        room: bytes of the device; None where it does not tell.
        repeats: timed calls.
    """
    cfg = precise(cfg, row.kind)
    needed = memory(cfg, row)
    if room is not None and needed > room:
        return {
            "error": f"needs about {needed / 2**30:.0f} GiB, the device has {room / 2**30:.0f}",
            "memory": needed,
        }
    try:
        with dispatch.naming(row.implementations()):
            return KINDS[row.kind](row, cfg, repeats) | {"memory": needed}
    except Exception as error:
        if is_out_of_memory(error):
            told = str(error).splitlines()[0][:160]
            return {
                "error": f"out of memory ({needed / 2**30:.0f} GiB were expected): {told}",
                "memory": needed,
            }
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300], "memory": needed}
    finally:
        jax.clear_caches()
        gc.collect()
