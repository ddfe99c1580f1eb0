"""Bytes that a cache holds, and that a decode step reads of it: from shapes alone, nothing is run."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.cache.paged import PagedState
from jaxllm.cache.policies.base import Policy
from jaxllm.cache.recurrent import RecurrentState
from jaxllm.cache.ring import RingState
from jaxllm.cache.rows import RowState
from jaxllm.cache.state import Cache
from pallas_kernels.paged_attention import QuantizedPages


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Held:
    """Bytes of a cache's arrays.

    Attributes:
        keys_values: pools, open tails, rings and slots of the attention layers, scales included.
        policies: what policies remember.
        tables: block tables and lengths.
        recurrent: states of the other layers.
    """

    keys_values: int
    policies: int
    tables: int
    recurrent: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.keys_values + self.policies + self.tables + self.recurrent


def held(cache: Cache) -> Held:
    """What ``cache`` holds, whether used or not; shapes are enough (``jax.eval_shape``)."""
    paged = [state for state in cache.layers if isinstance(state, PagedState)]
    policies = sum(_nbytes(state.memory) for state in paged)
    recurrent = sum(_nbytes(state) for state in cache.layers if isinstance(state, RecurrentState))
    tables = _nbytes(cache.groups)
    return Held(cache.nbytes() - policies - tables - recurrent, policies, tables, recurrent)


@dataclass(frozen=True)
class Traffic:
    """What reading one attention layer costs.

    Attributes:
        policy: name of its policy, "dense" or "window".
        dtype: of its keys and values.
        page: tokens of a page; None: it has none.
        open_token: bytes of key and value of one token and KV head, in a float dtype.
        sealed_token: the same of a token in a page, with the scales that are its own.
        page_scales: bytes of scales that belong to a page and KV head as a whole.
        by_token: single tokens are selected, and each brings the scales of its page.
        state: the layer's, for what its policy reads.
    """

    policy: str
    dtype: str
    page: int | None
    open_token: int
    sealed_token: int
    page_scales: int
    by_token: bool
    state: Any

    def keys_values(self, read: Any, stored: Any) -> Any:
        """Bytes of keys and values, int[..., K] tokens each -> int[...], summed over KV heads.

        The open tail is always read; its length follows from the stored tokens, where nothing is drafted.
        """
        read, stored = np.asarray(read), np.asarray(stored)
        if self.page is None:
            return np.sum(read, axis=-1) * self.open_token
        opened = np.where(stored > 0, (stored - 1) % self.page + 1, 0)
        sealed = read - opened
        # A step that reads everything goes through whole pages, whatever the policy selects otherwise.
        single = self.by_token & (read < stored)
        scaled = np.where(single, sealed, sealed // self.page)
        each = sealed * self.sealed_token + opened * self.open_token + scaled * self.page_scales
        return np.sum(each, axis=-1)

    def of_policy(self, stored: Any) -> Any:
        """Bytes that the policy itself reads, int[..., K] stored tokens -> [...]."""
        stored = np.asarray(stored)[..., 0]
        if not isinstance(self.state, PagedState):
            return np.zeros_like(stored)
        layout = self.state.layout
        sealed = np.maximum(stored - 1, 0) // layout.page * layout.page
        key, scales = _pool_token(self.state.k)
        key += scales // layout.page if not self.by_token else scales
        return self.state.policy.step_bytes(layout, sealed, key)


def traffic(state: RowState | RingState | PagedState) -> Traffic:
    """Of one attention layer; shapes are enough."""
    if not isinstance(state, PagedState):
        token = 2 * state.k.shape[-1] * state.k.dtype.itemsize
        name = "window" if isinstance(state, RingState) else "dense"
        return Traffic(name, _dtype(state.k), None, token, token, 0, False, state)
    keys, values = (_pool_token(pool) for pool in (state.k, state.v))
    policy = state.policy
    return Traffic(
        policy="dense" if type(policy) is Policy else type(policy).__name__,
        dtype=f"int{state.k.bits}" if isinstance(state.k, QuantizedPages) else _dtype(state.k),
        page=state.layout.page,
        open_token=2 * state.tail_k.shape[-1] * state.tail_k.dtype.itemsize,
        sealed_token=keys[0] + values[0],
        page_scales=keys[1] + values[1],
        by_token=policy.granularity == "token",
        state=state,
    )


def _pool_token(pool: Any) -> tuple[int, int]:
    """(bytes of one token and head of a pool, bytes that belong to a page and head)."""
    if not isinstance(pool, QuantizedPages):
        return pool.shape[-1] * pool.dtype.itemsize, 0
    scales = (
        pool.scale.shape[-1] * pool.scale.dtype.itemsize + pool.offset.shape[-1] * pool.offset.dtype.itemsize
    )
    codes = pool.codes.shape[-1] * pool.codes.dtype.itemsize
    return (codes, scales) if pool.per_channel else (codes + scales, 0)


def _dtype(pool: Any) -> str:
    return "bfloat16" if pool.dtype == jnp.uint16 else str(pool.dtype)
