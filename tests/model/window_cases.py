"""What the window tests share: small hybrids, their steps compiled once, and slots with something in them."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.batch import PackedBatch
from jaxllm.cache.kv import KVCache
from jaxllm.cache.paged import PagedState
from jaxllm.cache.state import Cache, init_cache, zero_slots
from jaxllm.config import (
    AttentionConfig,
    GatedDeltaConfig,
    JetConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from jaxllm.model import functional

SLOTS, ROWS, CAPACITY, W, VOCAB = 4, 3, 32, 6, 37


def model(pattern: str, rope: bool, groups: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        pattern=pattern,
        mamba=MambaConfig(num_heads=4, head_dim=4, state_size=8, n_groups=groups, chunk_size=4),
        attention=AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=4, window=5, rope=RopeConfig() if rope else None
        ),
        mlp=MLPConfig(16),
        delta=GatedDeltaConfig(
            num_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=6, chunk_size=4
        ),
        jet=JetConfig(num_heads=2, key_head_dim=4, value_head_dim=8, chunk_size=4),
        # Every expert is chosen: a choice would turn a difference in the last bit into another output.
        moe=MoEConfig(num_experts=2, top_k=2, intermediate_size=8),
        init_std=0.2,
    )


MODELS = {
    "mixed": model("M*-WE", True, 1),
    "mamba": model("MM", False, 2),
    "attention": model("W-*", False, 1),
    "delta": model("GJ", False, 1),
}


@functools.cache
def parameters(cfg: ModelConfig) -> Any:
    """Parameters away from their initial values, where many would be one or zero."""
    rng = np.random.default_rng(0)
    return functional.map_named(
        lambda _, v: v + 0.1 * rng.standard_normal(v.shape).astype(v.dtype), functional.init_params(cfg)
    )


@functools.cache
def steps(cfg: ModelConfig, bound: int | None = None, implementation: str = "auto"):
    """``extend`` and ``window`` (each: batch, cache -> logits, new cache or window state), and ``commit``."""
    params = parameters(cfg)
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

    def run(method: str, batch: PackedBatch, cache: Cache) -> Any:
        m = functional.merge(cfg, params)
        ctx = m.context(kv_bound=bound, implementation=implementation)
        h, after, _ = getattr(m, method)(batch, cache, ctx)
        return m.head(h, ctx), after

    def commit(window: Any, path: Any, n: Any) -> Cache:
        return functional.merge(cfg, params).commit(window, path, n)

    return jit(functools.partial(run, "extend")), jit(functools.partial(run, "window")), jit(commit)


def chunk(rows: list[list[int]], starts: Any, slots: Any) -> PackedBatch:
    """``extend``'s batch of one piece of text for each row, at most W tokens, from position ``starts`` on."""
    tokens = np.zeros((len(rows), W), np.int32)
    for row, piece in zip(tokens, rows):
        row[: len(piece)] = piece
    return PackedBatch.from_rows(tokens, lengths=[len(piece) for piece in rows], offset=starts, slots=slots)


def read(cfg: ModelConfig, cache: Cache, documents: list[list[int]], slots: Any) -> Cache:
    """``cache`` after ``extend`` over one document for each row, in chunks of W."""
    for start in range(0, max(map(len, documents), default=0), W):
        pieces = [document[start : start + W] for document in documents]
        cache = steps(cfg)[0](chunk(pieces, start, slots), cache)[1]
    return cache


def filled(
    cfg: ModelConfig, rng: np.random.Generator, lengths: list[int], slots: Any, kv: KVCache | None = None
) -> Cache:
    """Slots as earlier requests left them, then read anew: random documents of ``lengths``, one for each row."""
    cache = init_cache(cfg, SLOTS, CAPACITY, kv)
    fill = lambda leaf: jnp.asarray(rng.integers(1, 9, leaf.shape), leaf.dtype)  # noqa: E731
    cache = replace(cache, layers=jax.tree.map(fill, cache.layers))
    owners = np.arange(len(lengths)) if slots is None else slots[:, 0]
    cache = zero_slots(cache, jnp.asarray(owners))
    return read(cfg, cache, [rng.integers(0, VOCAB, n).tolist() for n in lengths], slots)


def stored(kept: Any) -> Any:
    """``kept`` with 0 for what paged layers have lying behind the last token of an open tail."""

    def clean(state: Any, groups: Any) -> Any:
        if not isinstance(state, PagedState):
            return state
        pages = groups[state.group] if state.pages is None else state.pages
        there = jnp.arange(state.layout.tail) < (pages.length - pages.sealed)[:, None]
        tails = (jnp.where(there[:, None, :, None], tail, 0) for tail in (state.tail_k, state.tail_v))
        return replace(state, **dict(zip(("tail_k", "tail_v"), tails)))

    if not isinstance(kept, Cache):
        return kept
    return replace(kept, layers=tuple(clean(state, kept.groups) for state in kept.layers))


def assert_caches_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    actual, expected = stored(actual), stored(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def assert_caches_equal(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
