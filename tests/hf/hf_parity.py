"""What parity means: prefill, cached decode and greedy continuation against expected logits."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.cache.state import init_cache
from jaxllm.config import ModelConfig
from jaxllm.model.functional import LanguageModel, merge
from tests.quick import QUICK

TOLERANCE = 1e-4
GAP = 1e-4
DISTINCT = 8


@dataclass
class Expected:
    """What the other implementation computes.

    Attributes:
        tokens: i[B, T].
        logits: f32[B, T, V] of ``tokens``.
        cached: f32[B, T - prefix, V] from its own cache, one token at a time after ``prefix``; None: as ``logits``.
        greedy: i[n]; continuation of ``tokens[0]``.
        gaps: f32[n]; difference of the two largest logits at each of these steps.
        prefix: tokens before cached decoding starts.
    """

    tokens: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray
    gaps: np.ndarray
    cached: np.ndarray | None = None
    prefix: int = 19


def assert_close(actual: Any, expected: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """max |difference| over the standard deviation of the expected logits, which is at most ``tolerance``."""
    std = float(expected.std())
    assert std >= 1, f"logits with standard deviation {std:.3f} hide errors"
    error = float(np.abs(np.asarray(actual, np.float32) - expected).max()) / std
    assert error <= tolerance, (
        f"max difference is {error:.2e} of the standard deviation, allowed {tolerance:.0e}"
    )
    return error


@functools.partial(jax.jit, static_argnames="cfg", compiler_options=QUICK)
def _forward(params: Any, batch: PackedBatch, *, cfg: ModelConfig) -> jax.Array:
    return merge(cfg, params)(batch)


def logits_of(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """f32[B, T, V]."""
    batch = PackedBatch.from_rows(tokens)
    return np.asarray(_forward(model.params, batch, cfg=model.cfg), np.float32)


def check_prefill(model: LanguageModel, expected: Expected, tolerance: float = TOLERANCE) -> float:
    """Forward without a cache."""
    return assert_close(logits_of(model, expected.tokens), expected.logits, tolerance)


@functools.partial(jax.jit, static_argnames="cfg", compiler_options=QUICK)
def _step(params: Any, cache: Any, tokens: jax.Array, offset: jax.Array, *, cfg: ModelConfig) -> Any:
    """(logits [B, V] of the last token, cache)."""
    module = merge(cfg, params)
    h, cache, _ = module.extend(PackedBatch.from_rows(tokens, offset=offset), cache)
    return module.head(h[:, -1:])[:, 0], cache


def check_cached(model: LanguageModel, expected: Expected) -> tuple[float, int]:
    """Prefill of a prefix, the other tokens one at a time, then a greedy continuation of the first row.

    Returns:
        Largest relative error of the logits, and the number of greedy mismatches, each at a near tie. After one the
        other implementation's token is followed, so that every step is compared.
    """
    assert len(set(expected.greedy.tolist())) >= DISTINCT, (
        "the continuation is too monotonous to test anything"
    )
    tokens, prefix = expected.tokens, expected.prefix
    rows, length = tokens.shape
    cache = init_cache(model.cfg, rows, length + len(expected.greedy))
    step = functools.partial(_step, model.params, cfg=model.cfg)
    logits, cache = step(cache, tokens[:, :prefix], jnp.int32(0))
    assert_close(logits, expected.logits[:, prefix - 1])
    decoded = []
    for t in range(prefix, length):
        logits, cache = step(cache, tokens[:, t : t + 1], jnp.int32(t))
        decoded.append(np.asarray(logits))
    error = assert_close(np.stack(decoded, 1), expected.logits[:, prefix:])
    if expected.cached is not None:
        error = max(error, assert_close(np.stack(decoded, 1), expected.cached))
    ties = 0
    for i, (token, gap) in enumerate(zip(expected.greedy, expected.gaps, strict=True)):
        mine = int(np.argmax(logits[0]))
        if mine != token:
            assert gap < GAP, f"step {i}: token {mine} instead of {token}, whose lead is {gap:.2e}"
            ties += 1
        logits, cache = step(cache, np.full((rows, 1), token), jnp.int32(length + i))
    return error, ties
