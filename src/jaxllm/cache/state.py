"""What a sequence leaves behind between tokens: slot pools, passed in and returned (contracts 2, 4 and 9).

Full attention layers own slots in one piece (:mod:`jaxllm.cache.rows`) or pages behind tables
(:mod:`jaxllm.cache.paged`), sliding windows rings (:mod:`jaxllm.cache.ring`), recurrent layers ``[S, ...]`` pools. Keys
are cached after RoPE.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxllm.cache.bits import stored_dtype
from jaxllm.cache.kv import KVCache
from jaxllm.cache.paged import PagedState, PageGroup, pool_of
from jaxllm.cache.policies.base import Policy, check_layers
from jaxllm.cache.recurrent import MatrixState, RecurrentState, drop
from jaxllm.cache.ring import RingState
from jaxllm.cache.rows import RowState
from jaxllm.cache.view import Layout
from jaxllm.config import ModelConfig, positive, require


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The states of all layers, one entry per pattern letter; None where a layer keeps nothing.

    Attributes:
        layers: as the layers keep them.
        groups: tables and lengths of the paged layers, one for each retention rule.
    """

    layers: tuple[Any, ...]
    groups: tuple[PageGroup, ...] = ()

    def opened(self) -> tuple[Any, ...]:
        """The layers' states, paged ones with their group: what a mixer takes."""
        return tuple(
            replace(state, pages=self.groups[state.group]) if isinstance(state, PagedState) else state
            for state in self.layers
        )

    def closed(self, states: tuple[Any, ...]) -> "Cache":
        """The cache that the mixers' states make; the layers of a group agree on its lengths."""
        groups = list(self.groups)
        for state in states:
            if isinstance(state, PagedState) and state.pages is not None:
                groups[state.group] = state.pages
        layers = (replace(state, pages=None) if isinstance(state, PagedState) else state for state in states)
        return Cache(layers=tuple(layers), groups=tuple(groups))

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def layer_state(
    cfg: ModelConfig,
    letter: str,
    slots: int,
    capacity: int,
    kv: KVCache,
    policy: Policy | None = None,
    group: int = 0,
    pages: int | None = None,
) -> Any:
    """A zeroed state of one layer with pattern letter ``letter``; arguments as in :func:`init_cache`."""
    recurrent = {"M": cfg.mamba, "G": cfg.delta, "J": cfg.jet}.get(letter)
    if recurrent is not None:
        return MatrixState(
            conv=jnp.zeros(
                (slots, recurrent.conv_kernel - 1, recurrent.conv_size), jnp.dtype(cfg.precision.compute)
            ),
            matrix=jnp.zeros((slots, *recurrent.state_shape), jnp.float32),
        )
    if letter not in "*W":
        return None
    a = cfg.attention
    assert a is not None
    dtype = stored_dtype(kv.float_dtype(cfg.precision))
    if letter == "W":
        assert a.window is not None
        shape = (slots, a.num_kv_heads, min(a.window + kv.draft, capacity), a.head_dim)
        return RingState(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), capacity=capacity)
    policy = policy or Policy()
    page = kv.pages_of(policy)
    if page is None:
        shape = (slots, a.num_kv_heads, capacity, a.head_dim)
        return RowState(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))
    n = capacity // page
    layout = Layout(
        slots=slots,
        pages=slots * n if pages is None else pages,
        pages_per_slot=n,
        page=page,
        tail=page + kv.draft,
        kv_heads=a.num_kv_heads,
        group=a.num_heads // a.num_kv_heads,
        head_dim=a.head_dim,
        scale=a.head_dim**-0.5,
    )
    policy.check(layout)
    tail = jnp.zeros((slots, a.num_kv_heads, layout.tail, a.head_dim), dtype)
    return PagedState(
        k=pool_of(layout, dtype, kv.bits, kv.keys_per_channel),
        v=pool_of(layout, dtype, kv.bits),
        tail_k=tail,
        tail_v=jnp.zeros_like(tail),
        # A policy may start from one array twice, which could not be donated.
        memory=jax.tree.map(jnp.copy, policy.init(layout)),
        policy=policy,
        layout=layout,
        group=group,
        consecutive=pages is None,
    )


def cache_groups(
    cfg: ModelConfig, policy: Policy | None
) -> tuple[tuple[Policy | None, ...], tuple[int, ...]]:
    """The retention rules of a model's full attention layers: (rules, index of the rule of each such layer).

    A rule is None, everything stays, or a policy that evicts.
    """
    policy = policy or Policy()
    count = cfg.pattern.count("*")
    check_layers(policy, count)
    chosen = [policy.at(layer) for layer in range(count)]
    rules = [p if p.evicts else None for p in chosen]
    distinct = tuple(dict.fromkeys(rules))
    return distinct, tuple(distinct.index(rule) for rule in rules)


def init_cache(
    cfg: ModelConfig,
    slots: int,
    capacity: int,
    kv: KVCache | None = None,
    policy: Policy | None = None,
    pages: tuple[int, ...] | None = None,
    stored: tuple[int, ...] | None = None,
) -> Cache:
    """Zeroed pools for every layer.

    Args:
        cfg: the model.
        slots: S; sequences held at once.
        capacity: most tokens that a slot holds.
        kv: dtype and page size of keys and values.
        policy: what attention reads and what stays; None: everything. A policy brings pages with it.
        pages: physical pages of every cache group (:func:`cache_groups`), which an allocator hands out: tables start
            empty. None: every slot owns as many as it needs.
        stored: most tokens that a slot stores in every cache group, rounded up to pages; None: its capacity.

    Raises:
        ConfigError: a size below 1, a page size that does not divide ``capacity``, or a policy that cannot work with
            this model or these sizes.
    """
    positive(slots=slots, capacity=capacity)
    kv, policy = kv or KVCache(), policy or Policy()
    if type(policy) is not Policy or policy.overrides:
        require(
            "*" in cfg.pattern, "policy", policy, "the model has no full attention layer that it could serve"
        )
    page = kv.pages_of(policy)
    require(
        page is None or capacity % page == 0,
        "kv.page_size",
        page,
        f"must divide the slot capacity of {capacity} tokens",
    )
    rules, member = cache_groups(cfg, policy)
    for name, given in (("pages", pages), ("stored", stored)):
        require(
            given is None or (page is not None and len(given) == len(rules)),
            name,
            given,
            f"one number for each of the {len(rules)} cache groups of a paged cache",
        )
    stored = stored or (capacity,) * len(rules)
    layers, seen = [], 0
    for letter in cfg.pattern:
        if letter == "*":
            group = member[seen]
            room = min(capacity, -(-stored[group] // page) * page) if page else capacity
            pool = None if pages is None else pages[group]
            chosen = replace(kv, page_size=page)
            layers.append(layer_state(cfg, letter, slots, room, chosen, policy.at(seen), group, pool))
            seen += 1
        else:
            layers.append(layer_state(cfg, letter, slots, capacity, kv))
    sizes = {state.group: state.layout for state in layers if isinstance(state, PagedState)}
    groups = (_group(sizes[i], pages is None) for i in range(len(sizes)))
    return Cache(layers=tuple(layers), groups=tuple(groups))


def _group(layout: Layout, owned: bool) -> PageGroup:
    slots, n = layout.slots, layout.pages_per_slot
    own = jnp.arange(slots * n, dtype=jnp.int32).reshape(slots, n)
    table = own if owned else jnp.full((slots, n), layout.pages, jnp.int32)
    return PageGroup(table, jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.int32))


def state_bytes(
    cfg: ModelConfig, length: int, kv: KVCache | None = None, policy: Policy | None = None
) -> int:
    """Bytes that one sequence of ``length`` tokens leaves behind."""
    return jax.eval_shape(lambda: init_cache(cfg, 1, length, kv, policy)).nbytes()


def zero_slots(cache: Cache, slots: Int[Array, " n"]) -> Cache:
    """Admission: what belongs to ``slots`` (-1: none) starts anew; keys past a row's length are never visible."""

    def zero(pool: Any) -> Any:
        return pool.at[drop(slots, len(pool))].set(0, mode="drop")

    def fresh(state: Any) -> Any:
        if isinstance(state, RecurrentState):
            return jax.tree.map(zero, state)
        if isinstance(state, PagedState):
            memory = replace(state.memory, per_slot=jax.tree.map(zero, state.memory.per_slot))
            return replace(state, memory=memory)
        return state

    groups = (replace(g, length=zero(g.length), sealed=zero(g.sealed)) for g in cache.groups)
    return Cache(layers=tuple(fresh(state) for state in cache.layers), groups=tuple(groups))


def rolled_back(cache: Cache, slots: Int[Array, " n"], tokens: Int[Array, " n"]) -> Cache:
    """The last ``tokens`` drafted tokens of every slot (-1: none) leave its open tail again.

    Only what was appended with ``drafting`` may be taken back, at most ``KVCache.draft`` tokens. Recurrent layers and
    rings of those slots come back through :func:`restored`.
    """
    groups = (
        replace(g, length=g.length.at[drop(slots, len(g.length))].add(-tokens, mode="drop"))
        for g in cache.groups
    )
    return replace(cache, groups=tuple(groups))


def snapshot(cache: Cache, slots: Int[Array, " n"]) -> tuple[Any, ...]:
    """What recurrent layers and rings hold of ``slots``: with the pages' lengths all that a slot is."""

    def taken(state: Any) -> Any:
        if not isinstance(state, RecurrentState | RingState):
            return None
        return jax.tree.map(
            lambda pool: pool.at[drop(slots, len(pool))].get(mode="fill", fill_value=0), state
        )

    return tuple(taken(state) for state in cache.layers)


def restored(cache: Cache, slots: Int[Array, " n"], kept: tuple[Any, ...]) -> Cache:
    """The inverse of :func:`snapshot`, into ``slots`` (-1: none)."""

    def put(state: Any, values: Any) -> Any:
        if values is None:
            return state
        write = lambda pool, value: pool.at[drop(slots, len(pool))].set(value, mode="drop")  # noqa: E731
        return jax.tree.map(write, state, values)

    return replace(cache, layers=tuple(put(state, values) for state, values in zip(cache.layers, kept)))
