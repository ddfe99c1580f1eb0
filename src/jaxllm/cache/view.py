"""One layer's paged keys and values as the rows of a step see them: what policies read (contract 4)."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.cache.bits import load
from pallas_kernels.paged_attention import QuantizedPages, dequantize_pages


@dataclass(frozen=True)
class Layout:
    """Sizes of one attention layer's cache, all static.

    Attributes:
        slots: S.
        pages: P, physical pages of the pool.
        pages_per_slot: n, most pages of a slot.
        page: tokens of a page.
        tail: t, tokens that a slot's open tail has room for; at least ``page``.
        kv_heads: K.
        group: query heads of a KV head.
        head_dim: d.
        scale: factor of the scores, as attention applies it.
    """

    slots: int
    pages: int
    pages_per_slot: int
    page: int
    tail: int
    kv_heads: int
    group: int
    head_dim: int
    scale: float

    @property
    def tokens(self) -> int:
        """L, most tokens that a slot can store: pages and tail."""
        return self.pages_per_slot * self.page + self.tail


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """B rows of a layer. A slot's stored tokens are numbered 0 .. length - 1 in temporal order, sealed ones first.

    Without eviction a stored token's number is its position.

    Attributes:
        slots: i32[B], slot of each row; S where it has none.
        table: i32[B, n], physical page of each page of the slot; n may be below ``Layout.pages_per_slot`` where the
            step reads less.
        sealed: i32[B], tokens in pages; a multiple of the page size.
        k_pages: pool [P, K, page, d] as the cache keeps it: floats, bfloat16 as its bits, or QuantizedPages.
        v_pages: as k_pages.
        tail_k: [B, K, t, d], the open tail.
        tail_v: as tail_k.
        tail_len: i32[B], tokens in the tail.
        scale: as ``Layout.scale``; static.
    """

    slots: Any
    table: Any
    sealed: Any
    k_pages: Any
    v_pages: Any
    tail_k: Any
    tail_v: Any
    tail_len: Any
    scale: float = field(metadata={"static": True})

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k_pages.shape[2]

    @property
    def tokens(self) -> int:
        """L, stored tokens that the view can show: n page + t."""
        return self.table.shape[1] * self.page + self.tail_k.shape[2]

    @property
    def length(self) -> Int[Array, " B"]:
        """Stored tokens."""
        return self.sealed + self.tail_len

    def stored(self) -> Bool[Array, "B L"]:
        """Which of the L numbers are stored tokens."""
        return jnp.arange(self.tokens) < self.length[:, None]

    def keys(self) -> Float[Array, "B K L d"]:
        """All stored keys by number, as attention multiplies them (dequantised), float32; 0 past the length."""
        return self._all(self.k_pages, self.tail_k)

    def values(self) -> Float[Array, "B K L d"]:
        """All stored values by number, likewise."""
        return self._all(self.v_pages, self.tail_v)

    def read_keys(self, tokens: Int[Array, "B K m"]) -> Float[Array, "B K m d"]:
        """Single keys by number, float32, without reading the others; 0 where the number is negative."""
        return self._some(self.k_pages, self.tail_k, tokens)

    def read_values(self, tokens: Int[Array, "B K m"]) -> Float[Array, "B K m d"]:
        """Single values by number, likewise."""
        return self._some(self.v_pages, self.tail_v, tokens)

    def _all(self, pages: Any, tail: Any) -> Any:
        heads, d = tail.shape[1], tail.shape[3]
        taken = jax.tree.map(lambda pool: load(pool[self.table]), pages)
        if isinstance(taken, QuantizedPages):
            # [B, n, K, page, d] has one axis more than a pool.
            flat = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), taken)
            taken = dequantize_pages(flat).reshape(*self.table.shape, heads, self.page, d)
        sealed = jnp.moveaxis(taken.astype(jnp.float32), 2, 1).reshape(len(tail), heads, -1, d)
        # The tail follows the sealed tokens, wherever they end.
        number = jnp.arange(self.tokens) - self.sealed[:, None]
        at = jnp.where(number < 0, jnp.arange(self.tokens), sealed.shape[2] + jnp.maximum(number, 0))
        at = jnp.clip(at, 0, self.tokens - 1)[:, None, :, None]
        both = jnp.concatenate([sealed, tail.astype(jnp.float32)], axis=2)
        return jnp.where(self.stored()[:, None, :, None], jnp.take_along_axis(both, at, axis=2), 0)

    def _some(self, pages: Any, tail: Any, tokens: Any) -> Any:
        heads = tail.shape[1]
        number = jnp.maximum(tokens, 0)
        rows, head = jnp.arange(len(tail))[:, None, None], jnp.arange(heads)[:, None]
        logical = jnp.minimum(number // self.page, self.table.shape[1] - 1)
        physical = self.table[rows, logical]

        def pick(pool: Any) -> Any:
            # Scales per channel have one row for the whole page.
            return load(pool[physical, head, jnp.minimum(number % self.page, pool.shape[2] - 1)])

        taken = jax.tree.map(pick, pages)
        if isinstance(taken, QuantizedPages):
            taken = dequantize_pages(taken)
        within = jnp.clip(number - self.sealed[:, None, None], 0, tail.shape[2] - 1)
        open_ = tail[rows, head, within].astype(jnp.float32)
        value = jnp.where((number < self.sealed[:, None, None])[..., None], taken.astype(jnp.float32), open_)
        return jnp.where((tokens >= 0)[..., None], value, 0)
