"""Ops on the CPU beside torch's, on the same cores, turn by turn in one process; the pairs of attention and paged decode.

torch has no paged attention on a CPU: its rows gather the pages and call ``scaled_dot_product_attention``, or read a
static cache with it. Every pair must give the same numbers before it is timed.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import attention
from pallas_kernels.paged_attention import paged_attention

H, K, D = 8, 2, 64
DTYPES = ("float32", "bfloat16")
AIM = 1.5
# Largest difference of the outputs, of values around 1.
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}
# Calls at least, and the seconds after which no further one begins.
LEAST, PATIENCE = 3, 20.0


@dataclass(frozen=True)
class Pair:
    """One call in both libraries; each returns something that numpy can read, when it is done.

    ``flops`` and ``bytes``, where they are counted, are what it must do at least: their time is the bound.
    """

    case: str
    dtype: str
    mode: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    flops: float | None = None
    bytes: float | None = None


def torch_threads() -> str | None:
    """Give torch as many threads as this process has cores, as XLA has; why not, where it is not there."""
    # Threads that spin between calls would take the cores from XLA.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
    except ImportError as error:
        return f"torch is not installed ({error})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores or 1)
    return None


def _arrays(dtype: str, *shapes: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    """The same normal numbers for both libraries."""
    import torch

    rng = np.random.default_rng(sum(map(len, shapes)))
    drawn = [rng.standard_normal(shape, np.float32) for shape in shapes]
    return [jnp.asarray(a, dtype) for a in drawn], [
        torch.from_numpy(a).to(getattr(torch, dtype)) for a in drawn
    ]


def _sdpa(q: Any, k: Any, v: Any, causal: bool) -> Any:
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _ours(fn: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    run = jax.jit(fn)
    return lambda: jax.block_until_ready(run(*arrays))


def _without_gradients(fn: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
    import torch

    def call() -> Any:
        with torch.no_grad():
            return fn(*arrays)

    return call


def prompts(quick: bool) -> Iterator[Pair]:
    """Causal attention over whole rows, and its gradients for a sum of the output."""
    import torch

    for B, T in ((4, 256),) if quick else ((4, 256), (1, 1024), (1, 4096)):
        places = jnp.broadcast_to(jnp.arange(T), (B, T))
        ids = jnp.ones_like(places)

        def forward(q: Any, k: Any, v: Any, places: Any = places, ids: Any = ids) -> Any:
            sides = {
                "q_positions": places,
                "kv_positions": places,
                "q_segment_ids": ids,
                "kv_segment_ids": ids,
            }
            return attention(q, k, v, **sides)

        def both(*arrays: Any, forward: Any = forward) -> Any:
            return jax.grad(lambda *a: jnp.sum(forward(*a), dtype=jnp.float32), (0, 1, 2))(*arrays)

        for dtype in DTYPES:
            ours, theirs = _arrays(dtype, (B, T, H, D), (B, T, K, D), (B, T, K, D))
            # Laid out as each library wants it.
            theirs = [w.transpose(1, 2).contiguous().requires_grad_() for w in theirs]
            name = f"attention B{B} T{T} H{H} K{K} d{D}"

            def gradients(*leaves: Any) -> Any:
                return torch.autograd.grad(_sdpa(*leaves, True).sum(), leaves)

            def plain(*leaves: Any) -> Any:
                return _sdpa(*leaves, True).transpose(1, 2)

            # Of the pairs that are not back in time; backward makes the scores anew, and four more products.
            work = {"flops": 2.0 * B * T * T * H * D}
            yield Pair(
                name, dtype, "forward", _ours(forward, *ours), _without_gradients(plain, *theirs), **work
            )
            run = _ours(both, *ours)
            yield Pair(
                name,
                dtype,
                "forward and backward",
                lambda run=run: [w.swapaxes(1, 2) for w in run()],
                lambda leaves=theirs: gradients(*leaves),
                flops=3.5 * work["flops"],
            )


def _read(B: int, S: int, dtype: str) -> float:
    """Bytes of the keys and values of S tokens, read once."""
    return 2.0 * B * K * S * D * jnp.dtype(dtype).itemsize


def decodes(quick: bool) -> Iterator[Pair]:
    """One query a row over S cached tokens: a static cache, consecutive pages, and pages in any order."""
    S, page = (256, 16) if quick else (4096, 16)
    for B in (1,) if quick else (1, 8, 32):
        n = S // page
        table = np.random.default_rng(B).permutation(B * n).reshape(B, n)
        lengths, last = jnp.full((B, K), S), jnp.full((B, 1), S - 1)
        for dtype in DTYPES:
            ours, theirs = _arrays(dtype, (B, 1, H, D), (B, K, S, D), (B, K, S, D))
            query = theirs[0].transpose(1, 2).contiguous()
            positions = jnp.broadcast_to(jnp.arange(S), (B, S))
            ids = jnp.ones_like(positions)

            def static(q: Any, k: Any, v: Any, last=last, positions=positions, ids=ids) -> Any:
                sides = {"q_positions": last, "kv_positions": positions}
                sides |= {"q_segment_ids": ids[:, -1:], "kv_segment_ids": ids}
                return attention(q, k, v, **sides, kv_layout="BKTD")

            def over_cache(q: Any, k: Any, v: Any) -> Any:
                return _sdpa(q, k, v, False).transpose(1, 2)

            yield Pair(
                f"decode B{B} S{S}, static cache",
                dtype,
                "forward",
                _ours(static, *ours),
                _without_gradients(over_cache, query, *theirs[1:]),
                bytes=_read(B, S, dtype),
            )
            ours, theirs = _arrays(dtype, (B, 1, H, D), (B * n, K, page, D), (B * n, K, page, D))
            query = theirs[0].transpose(1, 2).contiguous()
            yield from _paged(f"decode B{B} S{S}", dtype, ours, query, theirs[1:], table, lengths, last)


def _paged(name, dtype, ours, query, pools, table, lengths, last) -> Iterator[Pair]:
    import torch

    (B, n), page = table.shape, pools[0].shape[2]
    for label, order in (("pages in order", None), ("pages gathered", table)):
        index = torch.from_numpy(np.arange(B * n).reshape(B, n) if order is None else order)
        given = None if order is None else jnp.broadcast_to(jnp.asarray(order, jnp.int32)[:, None], (B, K, n))

        def ours_call(q: Any, k: Any, v: Any, given: Any = given) -> Any:
            return paged_attention(q, k, v, table=given, kv_len=lengths, q_positions=last).out

        def gathered(q: Any, k: Any, v: Any, index: Any = index) -> Any:
            k, v = (w[index].transpose(1, 2).reshape(B, K, n * page, D) for w in (k, v))
            return _sdpa(q, k, v, False).transpose(1, 2)

        yield Pair(
            f"{name}, {label} of {page}",
            dtype,
            "forward",
            _ours(ours_call, *ours),
            _without_gradients(gathered, query, *pools),
            bytes=_read(B, n * page, dtype),
        )


def _numbers(value: Any) -> list[np.ndarray]:
    leaves = list(value) if isinstance(value, list | tuple) else [value]
    return [np.asarray(w.detach().float() if hasattr(w, "detach") else w.astype(jnp.float32)) for w in leaves]


def agree(pair: Pair) -> None:
    """Raise AssertionError unless both libraries give the same."""
    for mine, other in zip(_numbers(pair.ours()), _numbers(pair.theirs()), strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(mine / scale, other / scale, atol=LIMITS[pair.dtype], rtol=0)


def bound(pair: Pair, reached: dict[str, float]) -> float | None:
    """Seconds that a pair must take of what this machine reaches; None where its work is not counted."""
    counted = {pair.dtype: pair.flops, "bytes_per_s": pair.bytes}
    return max((work / reached[name] for name, work in counted.items() if work is not None), default=None)


def measure(pair: Pair, repeats: int, reached: dict[str, float]) -> dict[str, Any]:
    """Medians of interleaved calls, of fewer than ``repeats`` where they take long.

    Args:
        pair: to measure.
        repeats: calls of each library.
        reached: what this machine reaches in the same run: FLOP/s by dtype, and "bytes_per_s".
    """
    agree(pair)
    times: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    while len(times[0]) < repeats and (len(times[0]) < LEAST or time.perf_counter() - begun < PATIENCE):
        for call, taken in zip((pair.ours, pair.theirs), times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    ours, theirs = map(statistics.median, times)
    row = {"case": pair.case, "operands": pair.dtype, "mode": pair.mode}
    row |= {"seconds": ours, "torch_seconds": theirs, "ratio": theirs / ours, "aim": AIM}
    return row | {"bound_seconds": bound(pair, reached), "repeats": len(times[0])}


def run(
    sources: Sequence[Callable[[bool], Iterator[Pair]]],
    quick: bool,
    repeats: int,
    reached: dict[str, float],
    show: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Every pair of these sources; ``missing`` says why there is none where torch is not installed."""
    missing = torch_threads()
    if missing is not None:
        return {"missing": missing, "results": []}
    import torch

    results = []
    for source in sources:
        for pair in source(quick):
            results.append(measure(pair, repeats, reached))
            show(results[-1])
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
