"""What ``decode`` measures: the model, its policies, and caches that hold a long context without a prefill."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import H2O, RKV, KVCache, ModelConfig, Pillar, Policy, Quest, SnapKV, StreamingLLM, Tactic
from jaxllm.cache.bits import store
from jaxllm.cache.paged import PagedState, put_pages
from jaxllm.cache.rows import RowState
from jaxllm.cache.state import Cache, cache_groups, init_cache
from jaxllm.config import AttentionConfig, MLPConfig, RopeConfig

DTYPES = ("bfloat16", "int8", "int4")
# Tokens that may still be appended to a filled cache; a multiple of every page.
ROOM = 512
# Pages sealed at once.
_CHUNK = 128


def model(layers: int = 4, width: int = 256) -> ModelConfig:
    """Qwen3's shape: 16 query heads, 4 KV heads of 128; narrow, so that attention is what takes time."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=width,
        pattern="*-" * layers,
        attention=AttentionConfig(
            num_heads=16, num_kv_heads=4, head_dim=128, rope=RopeConfig(theta=1e6), qk_norm=True
        ),
        mlp=MLPConfig(2 * width, "swiglu"),
        norm_eps=1e-6,
        norm_cast="first",
        tie_embeddings=True,
    )


def policies(context: int) -> dict[str, Policy]:
    """Every policy with a sixteenth of ``context`` to read or to keep; Tactic's share is an outcome."""
    budget = context // 16
    return {
        "dense": Policy(),
        "quest": Quest(budget=budget, dense_layers=()),
        "tactic": Tactic(),
        "pillar": Pillar(budget=1 / 16),
        "rkv": RKV(budget=budget),
        "snapkv": SnapKV(budget=budget),
        "h2o": H2O(heavy=budget // 2, recent=budget // 2),
        "streaming": StreamingLLM(recent=budget - 4),
    }


def filled(cfg: ModelConfig, context: int, kv: KVCache, policy: Policy, seed: int = 0) -> Cache:
    """A cache of one slot as after a prompt of ``context`` random tokens, with room for ``ROOM`` more.

    Pages are sealed through the cache's own function, so that codes and metadata are real. What evicts is given the
    tokens that it would have left. Tactic gets clusters of neighbours instead of K-means, which is measured apart.
    """
    rules, _ = cache_groups(cfg, policy)
    stored = tuple(context + ROOM if rule is None else rule.stored(context, ROOM) for rule in rules)
    # A prompt is stored whole before an eviction, which a filled cache never is.
    paged = kv.pages_of(policy) is not None
    cache = init_cache(cfg, 1, context + ROOM, kv, policy, stored=stored if paged else None)
    left = [context if rule is None else min(context, rule.stored(context, 0)) for rule in rules]
    layers, lengths = [], {}
    for index, state in enumerate(cache.layers):
        if isinstance(state, RowState):
            layers.append(_filled_rows(state, context, seed + index))
        elif isinstance(state, PagedState):
            lengths[state.group] = left[state.group] // state.layout.page * state.layout.page
            layers.append(_filled_pages(state, lengths[state.group], seed + index))
        else:
            layers.append(state)
    groups = tuple(
        replace(group, length=jnp.full(1, lengths[i], jnp.int32), sealed=jnp.full(1, lengths[i], jnp.int32))
        for i, group in enumerate(cache.groups)
    )
    return Cache(layers=tuple(layers), groups=groups)


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def _filled_rows(state: RowState, context: int, seed: int) -> RowState:
    _, heads, capacity, d = state.k.shape
    row = store(_normal(seed, 1, heads, capacity, d), state.k.dtype)
    return replace(state, k=row.at[:, :, context:].set(0), v=jnp.copy(row))


def _filled_pages(state: PagedState, tokens: int, seed: int) -> PagedState:
    layout = state.layout
    shape = (_CHUNK, layout.kv_heads, layout.page, layout.head_dim)
    seal = jax.jit(put_pages, donate_argnums=0)
    pages = tokens // layout.page
    for start in range(0, pages, _CHUNK):
        at = np.arange(start, start + _CHUNK, dtype=np.int32)
        k = _normal(seed + 1000 * start, *shape)
        state = seal(state, np.where(at < pages, at, layout.pages).astype(np.int32), k, k)
    if isinstance(state.policy, Tactic):
        state = replace(state, memory=_neighbours(state, tokens))
    return state


def _neighbours(state: PagedState, tokens: int) -> Any:
    """Tactic's memory, with runs of neighbours as clusters."""
    old, policy = state.memory.per_slot, state.policy
    assert isinstance(policy, Tactic)
    _, heads, most, d = old["centroids"].shape
    count = max(tokens - policy.sinks, 0)
    size = np.clip(count - np.arange(most) * policy.cluster, 0, policy.cluster).astype(np.int32)
    members = np.minimum(np.arange(old["members"].shape[2]) + policy.sinks, max(tokens - 1, 0))
    new = {
        # Means of as many standard normal keys.
        "centroids": _normal(1, 1, heads, most, d) / policy.cluster**0.5,
        "size": jnp.broadcast_to(size, (1, heads, most)) + 0,
        "members": jnp.broadcast_to(members.astype(np.int32), (1, heads, len(members))) + 0,
        "clustered": jnp.full(1, tokens, jnp.int32),
    }
    return replace(state.memory, per_slot=new)
