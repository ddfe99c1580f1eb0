"""How long a call takes on this device: kernel times from the GPU itself, wall time elsewhere."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.target import target

# Twice the second-level cache of an H200: writing it between calls leaves nothing of their inputs there.
_FLUSH = 2**27


def seconds(fn: Callable[..., Any], *args: Any, repeats: int = 11) -> float:
    """Median time of a call, compilation left out.

    On an NVIDIA GPU the sum of the times of its kernels, the second-level cache written over between calls; elsewhere
    the wall time until the results are there.
    """
    run = jax.jit(lambda *a: fn(*a))
    if target().platform == "cuda":
        return _on_gpu(run, args, repeats)
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _on_gpu(run: Callable[..., Any], args: tuple[Any, ...], repeats: int) -> float:
    buffer = jnp.zeros(_FLUSH, jnp.uint8)

    def flush(buffer: Any) -> Any:
        return buffer + jnp.uint8(1)

    def kernels(fn: Callable[..., Any], *operands: Any) -> list[float]:
        measured = compat.profiler.measure(fn, iterations=repeats)(*operands)[1]
        if measured is None:
            raise RuntimeError("the GPU reports no kernel times; is another profiler attached?")
        return measured if isinstance(measured, list) else [measured]

    with_flush = kernels(jax.jit(lambda args, buffer: (run(*args), flush(buffer))), args, buffer)
    alone = kernels(jax.jit(flush), buffer)
    return max(statistics.median(with_flush) - statistics.median(alone), 0.0) / 1e3
