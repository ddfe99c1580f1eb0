"""What checks of the FCP simulation against this CPU share: kernels of attention, their times, the curve through them."""

import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import attention, attention_backward
from parallel.context.costs import AttentionShape, Costs, Pass

# Queries, keys, and (query, key) pairs that are visible.
Kernel = tuple[int, int, int]
Key = TypeVar("Key", bound=Hashable)


def square(tokens: int) -> Kernel:
    """A document alone."""
    return tokens, tokens, tokens * (tokens + 1) // 2


def predicted(kernel: Kernel, costs: Costs, shape: AttentionShape, way: Pass = "forward") -> float:
    """Seconds by the simulator's rules; the masked part of a chunk with itself counts as area."""
    queries, keys, pairs = kernel
    side = np.sqrt(np.array([queries * keys], np.float64))
    return float(pairs * shape.flops(way) / costs.rate(side, copying=False)[0])


def fitted(seconds: dict[int, float], shape: AttentionShape, way: Pass = "forward") -> Costs:
    """The kernel's curve through measured squares, by least squares of the logarithm over a grid.

    Args:
        seconds: of :func:`square` of each number of tokens.
        shape: of the attention.
        way: the pass that was measured.

    Returns:
        Costs whose peak is what long chunks reach, copies taking nothing of it; all else is as it was.
    """
    best = (float("inf"), Costs())
    for tokens in np.geomspace(10, 4000, 200):
        base = replace(Costs(), peak=1.0, kernel_best=1.0, kernel_tokens=float(tokens), copy_share=0.0)
        logs = [np.log(predicted(square(n), base, shape, way) / s) for n, s in seconds.items()]
        peak = float(np.exp(np.mean(logs)))
        error = float(np.var(logs))
        if error < best[0]:
            best = error, replace(base, peak=peak)
    return best[1]


def forward(kernel: Kernel, shape: AttentionShape) -> Callable[[], Any]:
    """A call of attention of this size, float32."""
    queries, keys, pairs = kernel
    return partial(_attend, pairs < queries * keys, *_tensors(kernel, shape))


def backward(kernel: Kernel, shape: AttentionShape) -> Callable[[], Any]:
    """A call of its gradients, from what forward leaves."""
    queries, keys, pairs = kernel
    masked, tensors = pairs < queries * keys, _tensors(kernel, shape)
    out, lse = _attend(masked, *tensors)
    return partial(_gradients, masked, *tensors, out, lse, jnp.ones_like(out))


def turn_by_turn(calls: dict[Key, Callable[[], Any]], repeats: int) -> dict[Key, list[float]]:
    """Seconds of each call, all of them in every turn, after one that is not timed."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[key].append(time.perf_counter() - begin)
    return times


def _tensors(kernel: Kernel, shape: AttentionShape) -> list[jax.Array]:
    queries, keys, _ = kernel
    rng = np.random.default_rng(0)
    sizes = [(1, queries, shape.heads), (1, keys, shape.kv_heads), (1, keys, shape.kv_heads)]
    return [jnp.asarray(rng.standard_normal((*size, shape.head_dim)), jnp.float32) for size in sizes]


def _marks(local: bool, queries: int, keys: int) -> dict[str, jax.Array]:
    ones = partial(jnp.ones, dtype=jnp.int32)
    # Local queries are the last of their keys; others come after all of them.
    first = keys - queries if local else keys
    return {
        "q_positions": first + jnp.arange(queries)[None],
        "kv_positions": jnp.arange(keys)[None],
        "q_segment_ids": ones((1, queries)),
        "kv_segment_ids": ones((1, keys)),
    }


@partial(jax.jit, static_argnums=0)
def _attend(local: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    return attention(q, k, v, **_marks(local, q.shape[1], k.shape[1]), return_lse=True)


@partial(jax.jit, static_argnums=0)
def _gradients(local: bool, q: jax.Array, k: jax.Array, *kept: jax.Array) -> tuple[jax.Array, ...]:
    v, out, lse, dout = kept
    return attention_backward(q, k, v, out, lse, dout, **_marks(local, q.shape[1], k.shape[1]))
